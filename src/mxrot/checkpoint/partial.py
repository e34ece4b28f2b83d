"""The folder that a run fills, and from which a stopped run can be resumed.

`fingerprint.json` marks a folder as mxrot's. No other folder is ever used or removed. Each decoder block is a shard,
with a note of its hash beside it. The note is written last, so a block with a note is finished. Other files beside them
hold calibration text that the model has written, orders of channels, the training of rotations, and an unfinished
tuning of the whole network (noted.py).

The contents of the folder stay, whatever ends a run. If a new run finds work in it, it continues with `resume`, starts
over with `force`, and is refused without either. With `resume` nothing is ever deleted.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mxrot.checkpoint.files import INDEX, TEMPORARY, Written, seen, write_json, write_tensors
from mxrot.checkpoint.fingerprint import Stamps, differences, going_on
from mxrot.checkpoint.noted import NEW, NotedTensors
from mxrot.checkpoint.placing import PLACING, REPLACED
from mxrot.checkpoint.room import Room
from mxrot.checkpoint.side_files import TEMPLATES, is_side_file
from mxrot.documents import read_json
from mxrot.errors import CheckpointError, DamagedError
from mxrot.formats.quantizer import PACKED
from mxrot.interrupts import interrupt_waits
from mxrot.layers import ModelSize
from mxrot.models import Family
from mxrot.quantizing.record import BlockReport, LinearReport
from mxrot.tuning import Check

FINGERPRINT = "fingerprint.json"
_TUNING, _LIGHT, _POLISH, _ROTATIONS = "tuning", "light", "polish", "rotations"
_ORDERS, _CHOICE, _WINDOWS = "orders", "choice", "windows"
_NOTES = re.compile(
    rf"block-\d+\.json|({NEW})?({_TUNING}|{_LIGHT}|{_POLISH}|{_ROTATIONS}|{_ORDERS}|{_CHOICE}|{_WINDOWS}(-\w+)?)\.(safetensors|json)"
    rf"|{FINGERPRINT}|{PLACING}"
)
_RESULTS = re.compile(
    rf"model-\d+-of-\d+\.safetensors|{REPLACED}|{TEMPLATES}|README\.md|recipe\.toml|(config|run)\.json"
)
_LEFT_BY_SYSTEMS = re.compile(r"\.nfs.*|\.DS_Store")
_OLD_FINGERPRINT = {"model", "recipe", "windows", "seed", "device", "versions"}


def is_note(name: str) -> bool:
    """True if only a resumed run needs a file of this name."""
    return _NOTES.fullmatch(name) is not None or name.endswith(TEMPORARY)


class PartialCheckpoint:
    """The finished part of a run: one shard for each decoder block, and one for everything else."""

    def __init__(self, folder: Path, family: Family, blocks: int, room: Room | None = None) -> None:
        """`room` is checked before each block is made, and again before it is written."""
        self.folder, self.family, self.blocks, self.room = folder, family, blocks, room
        self.size = ModelSize()
        self.weight_map: dict[str, str] = {}
        self._written: dict[str, Written] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        """The shapes of the quantized weights, by the full names of their linears."""
        self.left_bytes: dict[str, int] = {}
        """The bytes of the weights of linears that were stored unquantized."""

    def shard(self, number: int) -> str:
        """The file name of a shard. Shard 0 holds everything outside the blocks, shard i + 1 holds block i."""
        return f"model-{number + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    def _report_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def load(self, index: int) -> tuple[dict[str, Tensor], BlockReport] | None:
        """A block that an earlier run finished. A block that cannot be read or was changed counts as unfinished. It
        will be made again, so the remaining files must fit on the disk."""
        found = self._finished(index)
        if found is None and self.room is not None:
            self.room.check()
        return found

    def _finished(self, index: int) -> tuple[dict[str, Tensor], BlockReport] | None:
        try:
            note = read_json(self._report_path(index))
            path = self.folder / self.shard(index + 1)
            written = seen(path)
            if written.sha256 != note["sha256"]:
                return None
            with interrupt_waits():
                table, named = note["report"], load_file(path)
            linears = [LinearReport(**{**x, "shape": tuple(x["shape"])}) for x in table["linears"]]
            checks = table["tuning"] and [Check(**check) for check in table["tuning"]]
            report = BlockReport(table["index"], table["seconds"], linears, checks, table["few_tokens"])
        except (DamagedError, OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        self._count(named, path.name, written, report)
        prefix = self.family.block_prefix(index) + "."
        return {name[len(prefix) :]: tensor for name, tensor in named.items()}, report

    def save(self, index: int, tensors: dict[str, Tensor], report: BlockReport) -> None:
        prefix = self.family.block_prefix(index)
        named = {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
        path = self.folder / self.shard(index + 1)
        self._check_room_for(named)
        written = write_tensors(path, named)
        self._count(named, path.name, written, report)
        # Write the report last: a block with a report is finished.
        write_json(self._report_path(index), {"sha256": written.sha256, "report": asdict(report)})

    def save_rest(self, tensors: dict[str, Tensor]) -> None:
        self._check_room_for(tensors)
        self._count(tensors, self.shard(0), write_tensors(self.folder / self.shard(0), tensors))

    def _check_room_for(self, named: dict[str, Tensor]) -> None:
        if self.room is not None:
            self.room.check_for(sum(tensor.nbytes for tensor in named.values()))

    def _count(self, named: dict[str, Tensor], shard: str, written: Written, report: BlockReport | None = None) -> None:
        self.weight_map |= dict.fromkeys(named, shard)
        left = {name: value.nbytes for name, value in named.items() if self.family.is_linear(name)}
        self.left_bytes |= left | {name: value.nbytes for name, value in named.items() if name == self._head}
        self.shapes |= {} if report is None else {linear.name: linear.shape for linear in report.linears}
        weights = 0 if report is None else sum(math.prod(linear.shape) for linear in report.linears)
        head = self.family.head if f"{self.family.head}.{PACKED}" in named else ""
        self.size += ModelSize.of(named, weights, left=left, head=head)
        self._written[shard] = written

    @property
    def _head(self) -> str:
        return f"{self.family.head}.weight"

    @property
    def left_alone(self) -> list[str]:
        """Full names of the linears of decoder blocks that were stored unquantized."""
        return sorted(name.removesuffix(".weight") for name in self.left_bytes if name != self._head)

    def left_table(self) -> dict[str, Any]:
        """The weights that were stored unquantized, with the head if it is stored, for the record."""
        taken = sum(self.left_bytes.values())
        return {
            "linears": sorted(name.removesuffix(".weight") for name in self.left_bytes),
            "bytes": taken,
            "share_of_bytes": taken / max(1, self.size.total_bytes),
        }

    @property
    def tuning_checkpoint(self) -> NotedTensors:
        return NotedTensors(self.folder / f"{_TUNING}.safetensors", "the state of tuning")

    @property
    def light_checkpoint(self) -> NotedTensors:
        return NotedTensors(self.folder / f"{_LIGHT}.safetensors", "the state of the light steps")

    @property
    def polish_checkpoint(self) -> NotedTensors:
        return NotedTensors(self.folder / f"{_POLISH}.safetensors", "the state of the polish")

    @property
    def rotation_checkpoint(self) -> NotedTensors:
        return NotedTensors(self.folder / f"{_ROTATIONS}.safetensors", "the training of rotations")

    @property
    def orders_checkpoint(self) -> NotedTensors:
        return NotedTensors(self.folder / f"{_ORDERS}.safetensors", "the orders of channels")

    @property
    def choice_checkpoint(self) -> NotedTensors:
        return NotedTensors(self.folder / f"{_CHOICE}.safetensors", "what candidates have cost")

    def load_windows(self, purpose: str) -> Tensor | None:
        """The token windows that `save_windows` kept. CheckpointError if they were changed."""
        kept = self._windows(purpose).load()
        return None if kept is None else kept["windows"]

    def save_windows(self, purpose: str, windows: Tensor) -> None:
        self._windows(purpose).save({"windows": windows})

    def _windows(self, purpose: str) -> NotedTensors:
        return NotedTensors(self.folder / f"{_WINDOWS}-{purpose}.safetensors", f"the text for {purpose}")

    def write_index(self) -> None:
        metadata = {"total_size": self.size.total_bytes}
        write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(self.weight_map.items()))})

    def results(self) -> dict[str, Written]:
        """All files of the result, by their names in the folder. CheckpointError if a shard is not what was written."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file() and not is_note(path.name))
        found = {path.relative_to(self.folder).as_posix(): seen(path) for path in paths if REPLACED not in path.parts}
        for name, written in self._written.items():
            if found.get(name) != written:
                raise CheckpointError(
                    f"{self.folder / name}: is not what this run has written there; did something else write to it?"
                )
        return {name: written for name, written in found.items() if name != "run.json"}


def holds_work(folder: Path) -> str | None:
    """The work in a partial folder that would have to be done again, in words. None if there is none."""
    blocks = len(list(folder.glob("block-*.json")))
    if blocks:
        return f"{blocks} finished block" + "s" * (blocks > 1)
    if any((folder / f"{kept}.safetensors").is_file() for kept in (_TUNING, _LIGHT, _POLISH)):
        return "an unfinished tuning"
    if (folder / f"{_ROTATIONS}.safetensors").is_file():
        return "a training of rotations"
    if (folder / f"{_CHOICE}.safetensors").is_file():
        return "what candidates have cost"
    if (folder / f"{_ORDERS}.safetensors").is_file():
        return "orders of channels"
    return "text that the model has written" if any(folder.glob(f"{_WINDOWS}-*.safetensors")) else None


def open_partial(partial: Path, fingerprint: dict[str, Any], stamps: Stamps, resume: bool) -> dict[str, Any]:
    """Create the working folder, or take over what an earlier run left there. Returns the fingerprint that is written
    there. See `check_free_to_work`.

    CheckpointError if the folder is not mxrot's, or with `resume` if it belongs to another run. Then nothing is
    changed.
    """
    check_ours(partial)
    found = read_fingerprint(partial)
    if resume and found is not None and (others := differences(found, fingerprint)):
        raise CheckpointError(
            f"{partial}: belongs to a run with another {', '.join(others)}; give another output, or start over with "
            "--force and without --resume"
        )
    try:
        if not resume or found is None:
            remove_partial(partial)
            partial.mkdir()
        else:
            fingerprint = going_on(found, fingerprint)
        # A killed run could not clean up; the temporary file of a new one has both marks.
        for path in {*partial.glob(f"*{TEMPORARY}"), *partial.glob(f"{NEW}*")}:
            path.unlink()
        write_json(partial / FINGERPRINT, {"by": "mxrot", "fingerprint": fingerprint, "stamps": stamps})
    except BaseException:
        if holds_work(partial) is None:
            remove_partial(partial)
        raise
    return fingerprint


def check_free_to_work(partial: Path, resume: bool, force: bool) -> None:
    """CheckpointError unless a run may work in this folder, as far as this is known without its fingerprint.

    What an earlier run left there is continued with `resume`, and deleted with `force` alone.
    """
    check_ours(partial, may_lack_notes=resume)
    if resume:
        if (partial / FINGERPRINT).exists() and read_fingerprint(partial) is None:
            raise CheckpointError(
                f"{partial / FINGERPRINT}: is damaged and does not say which run the work in its folder belongs to; "
                "start over with --force and without --resume"
            )
    elif not force and (work := holds_work(partial)):
        raise CheckpointError(
            f"{partial}: holds {work} of an earlier run; continue with --resume, or start over with --force"
        )


def check_ours(partial: Path, may_lack_notes: bool = False) -> None:
    """CheckpointError if the folder exists and was not made by mxrot.

    With `may_lack_notes`, run.json may replace the fingerprint. It also holds a fingerprint, which is compared later.
    """
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise CheckpointError(f"{partial}: is needed as the work folder, and is not a folder; move it away")
    if not partial.exists():
        return
    names = sorted(path.name for path in partial.iterdir())
    strange = [name for name in names if not _is_ours(name)]
    if strange:
        raise CheckpointError(
            f"{partial}: is needed to work in, and holds {strange[0]!r}, which is not from a run of mxrot; move it "
            "away, or give another output"
        )
    signed = {FINGERPRINT, FINGERPRINT + TEMPORARY, *(["run.json"] if may_lack_notes else [])}
    if names and not signed.intersection(names):
        raise CheckpointError(
            f"{partial}: is needed to work in, and has no {FINGERPRINT} that says which run it belongs to; move "
            "it away, or give another output"
        )


def remove_partial(partial: Path) -> None:
    """Remove the folder, if it is mxrot's. See `check_ours`."""
    check_ours(partial)
    if partial.exists():
        shutil.rmtree(partial)


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """The fingerprint of a partial folder. None if it cannot be read."""
    table = _read(folder / FINGERPRINT)
    found = table if table.keys() >= _OLD_FINGERPRINT else table.get("fingerprint")
    return found if isinstance(found, dict) else None


def read_stamps(folder: Path) -> Stamps:
    """The hashes of the model's files that an earlier run noted there."""
    stamps = _read(folder / FINGERPRINT).get("stamps")
    return stamps if isinstance(stamps, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except DamagedError:
        return {}


def _is_ours(name: str) -> bool:
    plain = name.removesuffix(TEMPORARY)
    known = plain == INDEX or is_side_file(plain)
    return known or any(some.fullmatch(plain) for some in (_NOTES, _RESULTS, _LEFT_BY_SYSTEMS))
