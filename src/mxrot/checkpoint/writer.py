"""Quantize a model into a checkpoint folder.

All work happens in `NAME.partial` beside the output; the output appears by one rename at the end, and what stood
there before (with `force`) is removed only then. Each decoder block is one shard, so that a finished block is on
disk for good: a run that was killed continues from there with `resume`, and writes the same bytes in the end.

After an error the partial folder is removed, unless `resume` asked to keep finished blocks; after an interrupt it
is kept.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxrot.checkpoint.card import describe_source, model_card
from mxrot.checkpoint.config import check_exportable, quantization_config
from mxrot.checkpoint.files import sha256_of, write_bytes, write_json
from mxrot.checkpoint.fingerprint import fingerprint_of
from mxrot.checkpoint.output import check_output, put_in_place
from mxrot.checkpoint.partial import PartialCheckpoint, open_partial
from mxrot.checkpoint.reader import check_files
from mxrot.checkpoint.side_files import copy_side_files
from mxrot.errors import CheckpointError
from mxrot.models import find_family, read_config
from mxrot.pipeline import quantize
from mxrot.progress import Progress, silent
from mxrot.recipe import Recipe
from mxrot.records import RunRecord


def quantize_to_folder(
    source: Path,
    recipe: Recipe,
    output: Path,
    *,
    base_name: str,
    windows: Tensor | None = None,
    data: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    force: bool = False,
    resume: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Quantize the model in `source` into the new folder `output`; returns the contents of its run.json.

    `data` describes the calibration text for the record. CheckpointError if `output` exists and is not empty,
    unless `force`; DiskFullError if the disk fills up (what stood at `output` is intact then).
    """
    check_exportable(recipe)
    config = read_config(source)
    family = find_family(config, str(source))
    fingerprint = fingerprint_of(source, recipe, windows, device, seed)
    if resume and (finished := _finished_run(output, fingerprint)):
        return finished
    check_output(output, force)
    if source.resolve().is_relative_to(output.resolve()):
        raise CheckpointError(f"{output}: holds the model that is to be quantized; give another folder")
    partial = output.with_name(output.name + ".partial")
    store = PartialCheckpoint(partial, family, config.num_hidden_layers)
    try:
        open_partial(partial, fingerprint, resume)
        result = quantize(source, recipe, windows=windows, device=device, seed=seed, store=store, progress=progress)
        run = _write_around(store, source, recipe, result.record, base_name, data, fingerprint)
        for note in store.notes():  # only now: until run.json is written, a killed run goes on from them
            note.unlink()
        put_in_place(partial, output)
        return run
    except KeyboardInterrupt:
        if not store.holds_work:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except Exception:  # whatever it was, nobody asked to keep a part of the result; it goes on to the caller
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _finished_run(output: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """run.json of `output` if it is the result of this very run."""
    try:
        run = json.loads((output / "run.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(run, dict) or run.get("fingerprint") != fingerprint:
        return None
    try:
        check_files(output)
    except CheckpointError:
        return None
    return run


def _write_around(
    store: PartialCheckpoint,
    source: Path,
    recipe: Recipe,
    record: RunRecord,
    base_name: str,
    data: dict[str, Any] | None,
    fingerprint: dict[str, Any],
) -> dict[str, Any]:
    """Everything but the shards: index, config, tokenizer, recipe, card and run.json."""
    folder = store.folder
    store.write_index()
    config = json.loads((source / "config.json").read_text())
    ignored = sorted(
        name.removesuffix(".weight")
        for name in store.weight_map
        if name.startswith(store.family.blocks) and _is_linear(name, store)
    )
    config["quantization_config"] = quantization_config(recipe, store.family, store.blocks, ignored)
    write_json(folder / "config.json", config)
    copy_side_files(source, folder)
    write_bytes(folder / "recipe.toml", recipe.to_toml().encode())
    has_bias = any(f"{name.removesuffix('.bias')}.weight_packed" in store.weight_map for name in store.weight_map)
    card = model_card(describe_source(base_name, source), recipe, store.size, has_bias)
    write_bytes(folder / "README.md", card.encode())
    paths = sorted(set(folder.iterdir()) - {*store.notes(), folder / "run.json"})
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    size = {**vars(store.size), "bits_per_weight": store.size.bits_per_weight, "total_bytes": store.size.total_bytes}
    run = {
        "model": base_name,
        "fingerprint": fingerprint,
        "data": data,
        "size": size,
        **record.as_table(),
        "files": files,
    }
    write_json(folder / "run.json", run)
    return run


def _is_linear(name: str, store: PartialCheckpoint) -> bool:
    """Is this the weight of a linear of a site that was left alone?"""
    return any(name.endswith(f".{linear}.weight") for site in store.family.sites for linear in site.linears)
