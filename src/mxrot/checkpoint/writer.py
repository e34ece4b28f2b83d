"""Quantize a model into a checkpoint folder.

All work happens in `NAME.partial` beside the output; the output appears by one rename at the end, and what stood
there before (with `force`) is removed only then. Each decoder block is one shard, so that a finished block is on
disk for good: a run that was killed continues from there with `resume`, and writes the same bytes in the end.

After an error the partial folder is removed, unless `resume` asked to keep finished blocks; after an interrupt it
is kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mxrot.checkpoint.card import describe_source, model_card
from mxrot.checkpoint.config import check_exportable, quantization_config
from mxrot.checkpoint.files import INDEX, sha256_of, write_bytes, write_json, write_tensors
from mxrot.checkpoint.reader import check_files
from mxrot.errors import CheckpointError
from mxrot.interrupts import interrupt_waits
from mxrot.layers import ModelSize
from mxrot.models import Family, WeightFiles, find_family, read_config
from mxrot.pipeline import quantize
from mxrot.progress import Progress, silent
from mxrot.recipe import Recipe
from mxrot.records import BlockReport, LinearReport, RunRecord, device_name, versions
from mxrot.tuning import Check

_FINGERPRINT = "fingerprint.json"
_TUNING = "tuning.safetensors"
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


class PartialCheckpoint:
    """The folder that a run fills: one shard a decoder block, and one for everything else."""

    def __init__(self, folder: Path, family: Family, blocks: int) -> None:
        self.folder, self.family, self.blocks = folder, family, blocks
        self.size = ModelSize()
        self.weight_map: dict[str, str] = {}

    def shard(self, number: int) -> str:
        """File name of a shard: 0 holds everything outside of the blocks, i + 1 block i."""
        return f"model-{number + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    def _report_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    @property
    def holds_work(self) -> bool:
        """Is there anything that a resumed run would not do again?"""
        return any(self.folder.glob("block-*.json")) or self.keeper.path.is_file()

    def load(self, index: int) -> tuple[dict[str, Tensor], BlockReport] | None:
        """A block that an earlier run finished. One that cannot be read counts as unfinished."""
        try:
            note = json.loads(self._report_path(index).read_text())
            path = self.folder / self.shard(index + 1)
            if sha256_of(path) != note["sha256"]:
                return None
            with interrupt_waits():
                table, named = note["report"], load_file(path)
            linears = [LinearReport(**{**x, "shape": tuple(x["shape"])}) for x in table["linears"]]
            checks = table["tuning"] and [Check(**check) for check in table["tuning"]]
            report = BlockReport(table["index"], table["seconds"], linears, checks, table["few_tokens"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        self._count(named, self.shard(index + 1))
        prefix = self.family.block_prefix(index) + "."
        return {name[len(prefix) :]: tensor for name, tensor in named.items()}, report

    def save(self, index: int, tensors: dict[str, Tensor], report: BlockReport) -> None:
        prefix = self.family.block_prefix(index)
        named = {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
        path = self.folder / self.shard(index + 1)
        write_tensors(path, named)
        self._count(named, path.name)
        # Last: a block with a report is finished.
        write_json(self._report_path(index), {"sha256": sha256_of(path), "report": asdict(report)})

    def save_rest(self, tensors: dict[str, Tensor]) -> None:
        write_tensors(self.folder / self.shard(0), tensors)
        self._count(tensors, self.shard(0))

    def _count(self, named: dict[str, Tensor], shard: str) -> None:
        self.weight_map |= dict.fromkeys(named, shard)
        self.size += ModelSize.of(named)

    @property
    def keeper(self) -> PartialTuning:
        return PartialTuning(self.folder / _TUNING)

    def write_index(self) -> None:
        metadata = {"total_size": self.size.total_bytes}
        write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(self.weight_map.items()))})

    def notes(self) -> list[Path]:
        """Files that only a resumed run needs, what says whose they are last."""
        tuning = [path for path in (self.folder / _TUNING,) if path.is_file()]
        return [*self.folder.glob("block-*.json"), *tuning, self.folder / _FINGERPRINT]


@dataclass(frozen=True)
class PartialTuning:
    """An unfinished tuning run in a file."""

    path: Path

    def load(self) -> dict[str, Tensor] | None:
        """None if there is none, or one that cannot be read."""
        try:
            with interrupt_waits():
                return load_file(self.path)
        except (OSError, SafetensorError):
            return None

    def save(self, tensors: dict[str, Tensor]) -> None:
        write_tensors(self.path, tensors)


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
    fingerprint = _fingerprint(source, recipe, windows, device, seed)
    if resume and (finished := _finished_run(output, fingerprint)):
        return finished
    check_output(output, force)
    if source.resolve().is_relative_to(output.resolve()):
        raise CheckpointError(f"{output}: holds the model that is to be quantized; give another folder")
    partial = output.with_name(output.name + ".partial")
    store = PartialCheckpoint(partial, family, config.num_hidden_layers)
    try:
        _open_partial(partial, fingerprint, resume)
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


def check_output(output: Path, force: bool) -> None:
    """CheckpointError if `output` is there and not an empty folder, unless `force` replaces it."""
    if output.name in ("", ".."):
        raise CheckpointError(f"{output}: has no name of its own; name the folder to be made")
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path}: is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise CheckpointError(f"{output}: exists and is not empty; use --force to replace it, or another folder")


def _fingerprint(
    source: Path, recipe: Recipe, windows: Tensor | None, device: torch.device | str, seed: int
) -> dict[str, Any]:
    """What decides about the bits of a checkpoint."""
    data = None if windows is None else hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return {
        "model": WeightFiles(source).fingerprint(),
        "recipe": hashlib.sha256(recipe.to_toml().encode()).hexdigest(),
        "windows": data,
        "seed": seed,
        "device": device_name(torch.device(device)),
        "versions": versions(),
    }


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


def _open_partial(partial: Path, fingerprint: dict[str, Any], resume: bool) -> None:
    """Make the folder to work in, or take up the one that an earlier run of the same kind left."""
    try:
        found = json.loads((partial / _FINGERPRINT).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        found = None
    if resume and found is not None and found != fingerprint:
        differs = ", ".join(sorted(key for key in fingerprint if found.get(key) != fingerprint[key]))
        raise CheckpointError(
            f"{partial}: belongs to a run with another {differs}; remove it, or start over without --resume"
        )
    if not resume or found is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(partial / _FINGERPRINT, fingerprint)
    for path in partial.glob("*.tmp"):  # a killed run could not tidy up
        path.unlink()


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
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            write_bytes(folder / path.name, path.read_bytes())
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


def put_in_place(partial: Path, output: Path) -> None:
    """Put the finished folder in place; what stood there goes last."""
    old = output.with_name(output.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    replaces = output.exists()
    if replaces:
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if replaces:
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
