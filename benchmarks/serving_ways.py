"""The columns of benchmarks/serving.py: by name, which folder is served, and how."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from serving_figures import BASELINE, PLUGIN
from serving_random import FOLDERS, head_folders

from mxrot.checkpoint.layout import read_layout
from mxrot.documents import read_json
from mxrot.errors import CheckpointError
from mxrot.scheme import SiteScheme

STOCK = {"quantization": "compressed-tensors", "linear_backend": "marlin"}
MARLIN = "stock W4A16"


class Way(NamedTuple):
    """What one engine serves."""

    folder: Path
    own: dict[str, Any]
    """Options of vLLM's LLM that belong to it."""
    plugins: str
    """VLLM_PLUGINS."""
    head: SiteScheme | None = None
    """The scheme of a quantized head."""


def ways_of(options: argparse.Namespace) -> dict[str, Way]:
    """By name, what is served of models with a text."""
    if options.original is None:
        return {}
    found = {BASELINE: Way(options.original, {}, "")}
    if options.stock is not None:
        found[MARLIN] = Way(options.stock, STOCK, "")
    if options.checkpoint is not None:
        found[PLUGIN] = Way(options.checkpoint, {}, "mxrot")
    return found | with_heads(options.head_checkpoint, {})


def random_ways_of(options: argparse.Namespace) -> dict[str, Way]:
    """The same of models of random weights, which have no tokenizer."""
    if options.random is None:
        return {}
    bare = {"skip_tokenizer_init": True}
    own: dict[str, dict[str, Any]] = {BASELINE: {"load_format": "dummy"}, MARLIN: STOCK, PLUGIN: {}}
    found = {
        way: Way(options.random / name, own[way] | bare, "mxrot" if way == PLUGIN else "")
        for way, name in FOLDERS.items()
    }
    return found | with_heads(head_folders(options.random), bare)


def with_heads(folders: Iterable[Path], own: dict[str, Any]) -> dict[str, Way]:
    """Checkpoints for the plugin with quantized heads, named by the formats of weights and inputs of the head.

    CheckpointError if a head is not quantized, or if two heads have the same formats.
    """
    found: dict[str, Way] = {}
    for folder in folders:
        head = read_layout(read_json(folder / "config.json").get("quantization_config"), str(folder)).head_scheme
        if head is None:
            raise CheckpointError(f"{folder}: its head is not quantized; write it by `mxrot quantize --head mxint8`")
        formats = "/".join(one.format.name for one in (head.weights, head.activations) if one is not None)
        name = f"{PLUGIN}, head {formats}"
        if name in found:
            raise CheckpointError(f"{folder}: the head of {found[name].folder} is in {formats}, too; leave one out")
        found[name] = Way(folder, own, "mxrot", head)
    return found
