"""A checkpoint folder after all checks that need no tensor value.

All code that opens a checkpoint uses this module, also from transformers and vLLM. config.json, the headers and the
index of all weight files, recipe.toml and run.json must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mxrot.checkpoint.agreement import check_layout, check_recipe, settled
from mxrot.checkpoint.contents import (
    check_blocks,
    check_counts,
    check_tensors,
    install_linears,
    read_stored,
)
from mxrot.checkpoint.layout import Layout, check_marker, read_layout
from mxrot.checkpoint.verification import Records, check_files, read_records
from mxrot.documents import read_json
from mxrot.errors import CheckpointError, MxrotError
from mxrot.layers import build_apart
from mxrot.marker import SAVED_BY, is_ours
from mxrot.models import Family, find_family, read_config, read_generation_config
from mxrot.models.headers import StoredTensor
from mxrot.scheme import Scheme


@dataclass(frozen=True)
class Checked:
    """A checkpoint whose files agree."""

    folder: Path
    config: Any
    """The transformers config, without the `quantization_config`."""
    quantization: dict[str, Any]
    family: Family
    layout: Layout
    scheme: Scheme
    tensors: dict[str, StoredTensor]
    """Tensors by their names in the model."""
    records: Records | None
    """None if only `save_pretrained` has written the folder."""
    skeleton: PreTrainedModel
    """The model with its quantized linears, on the meta device."""


def is_checkpoint(folder: Path) -> bool:
    """True if mxrot has written this folder, even if it is damaged. It has the marker in config.json, or files that
    only mxrot writes."""
    if all((folder / name).exists() for name in ("run.json", "recipe.toml")):
        return True
    try:
        return is_ours(read_json(folder / "config.json").get("quantization_config"))
    except CheckpointError:
        return False


@contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """While open, errors are raised as a CheckpointError that names the folder."""
    try:
        yield
    except CheckpointError:
        raise
    except MxrotError as error:
        named = str(error).startswith(str(folder))
        raise CheckpointError(str(error) if named else f"{folder}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: {error.strerror or error}") from error


def check_checkpoint(folder: Path, verify: bool | None = None) -> Checked:
    """CheckpointError unless all files agree. `verify` is as for `verification.check_files`."""
    with checkpoint_errors(folder):
        return _check(folder, verify)


def _check(folder: Path, verify: bool | None) -> Checked:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    table = read_json(folder / "config.json")
    quantization: Any = table.get("quantization_config")
    marker = check_marker(quantization, str(folder))
    stored = read_stored(folder)
    records = read_records(folder, stored, was_saved_again=SAVED_BY in marker)
    check_files(folder, records, verify)
    layout = read_layout(quantization, str(folder))
    check_counts(table, stored)
    config = read_config(folder)
    del config.quantization_config
    family = find_family(config, str(folder))
    tensors = stored.tensors(family)
    blocks = config.get_text_config().num_hidden_layers
    check_blocks(config, family, tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    scheme = settled(layout, layout.scheme(family, blocks), family, shapes)
    check_layout(quantization, layout, scheme, family)
    skeleton = build_apart(config)
    if records is not None:
        check_recipe(Scheme.of(records.recipe, family, skeleton), scheme, family, layout.version)
    read_generation_config(skeleton, folder)
    install_linears(skeleton, family, scheme)
    check_tensors(skeleton, family, tensors, bool(config.tie_word_embeddings))
    return Checked(folder, config, quantization, family, layout, scheme, tensors, records, skeleton)
