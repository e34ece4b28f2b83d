"""The folder that a run fills, and from which it goes on after it was stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mxrot.checkpoint.files import INDEX, sha256_of, write_json, write_tensors
from mxrot.errors import CheckpointError
from mxrot.interrupts import interrupt_waits
from mxrot.layers import ModelSize
from mxrot.models import Family
from mxrot.records import BlockReport, LinearReport
from mxrot.tuning import Check

_FINGERPRINT = "fingerprint.json"
_TUNING = "tuning.safetensors"


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


def open_partial(partial: Path, fingerprint: dict[str, Any], resume: bool) -> None:
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
