"""Measured crossovers: the number of rows up to which each path of a linear is the fastest.

`mxrot bench kernels --remember` measures them on this device and stores them for it. Without such a measurement,
earlier figures from a device of the same compute capability are used.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mxrot.cache import cache_folder
from mxrot.documents import read_json
from mxrot.errors import DamagedError, MxrotWarning

MOST_ROWS = 128
"""The most rows for the product from packed codes."""


MOST_MIDDLE_ROWS = 1024
"""The most rows for which the product for middle rows is measured."""


@dataclass(frozen=True)
class Crossovers:
    """The largest numbers of input rows, at most `MOST_ROWS`, for which the product from packed codes for few rows is
    the fastest, and the range for which the product for middle rows is, if it is available."""

    packed: int
    """If weights are packed, and lifted to FP8 for more rows."""
    kept: int
    """If weights are kept in FP8."""
    few: int = 0
    """The product for middle rows is used for more rows than this."""
    middle: int = 0
    """It is used up to this number if weights are packed. 0 means never."""
    middle_kept: int = 0
    """The same if they are kept in FP8. Both are at most `MOST_MIDDLE_ROWS`."""

    def __post_init__(self) -> None:
        if not (0 <= self.packed <= MOST_ROWS and 0 <= self.kept <= MOST_ROWS):
            raise ValueError(f"{self}: expected 0 to {MOST_ROWS} rows")
        if not all(0 <= rows <= MOST_MIDDLE_ROWS for rows in (self.few, self.middle, self.middle_kept)):
            raise ValueError(f"{self}: expected 0 to {MOST_MIDDLE_ROWS} middle rows")


MEASURED: dict[tuple[int, int], Crossovers] = {
    (9, 0): Crossovers(packed=64, kept=16, few=8, middle=256, middle_kept=64)
}
"""By compute capability, if both speed and perplexity were measured on such a device: 9.0 on an H100, its middle rows
on an H200."""


def file_of_crossovers() -> Path:
    return cache_folder() / "crossovers.json"


@dataclass(frozen=True)
class Found:
    """The crossovers that apply on a device."""

    crossovers: Crossovers
    origin: str
    """The place where they were measured."""


@cache
def crossovers_of(device: torch.device) -> Crossovers | None:
    """The stored crossovers of devices with this name, otherwise those of the compute capability.

    They are looked up once per device, because every call of a linear needs them. A damaged file counts as missing,
    with a warning.
    """
    found = find_crossovers(device)
    return None if found is None else found.crossovers


def find_crossovers(device: torch.device) -> Found | None:
    """The same crossovers, with their origin. None if there is no choice, as on a CPU."""
    if device.type != "cuda":
        return None
    remembered = _remembered(torch.cuda.get_device_name(device))
    if remembered is not None:
        return Found(remembered, "this device")
    capability = torch.cuda.get_device_capability(device)
    measured = MEASURED.get(capability)
    return None if measured is None else Found(measured, f"compute capability {capability[0]}.{capability[1]}")


def remember(device: torch.device, crossovers: Crossovers) -> Path:
    """Store the crossovers for devices of this name, and return the file. Its readable entries for other devices are
    kept."""
    path = file_of_crossovers()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        entries = _read(path)
    except DamagedError:
        entries = {}
    kept = {name: entry_of(found) for name, found in entries.items() if isinstance(found, Crossovers)}
    unfinished = path.with_suffix(f".{os.getpid()}")
    table = kept | {torch.cuda.get_device_name(device): entry_of(crossovers)}
    unfinished.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    crossovers_of.cache_clear()
    return path


def _remembered(name: str) -> Crossovers | None:
    path = file_of_crossovers()
    try:
        found = _read(path).get(name)
        if isinstance(found, ValueError):
            raise DamagedError(f"{path}: {name}: {found}")
    except DamagedError as error:
        warnings.warn(
            f"{error}; what was measured on this device is not used until `mxrot bench kernels --remember` "
            "writes the file again",
            MxrotWarning,
            stacklevel=2,
        )
        return None
    return found


def _read(path: Path) -> dict[str, Crossovers | ValueError]:
    """The measurement by device name, or the error in it. DamagedError if the file is not a table."""
    if not os.path.exists(path):
        return {}
    return {name: _crossovers(entry) for name, entry in read_json(path).items()}


def entry_of(crossovers: Crossovers) -> dict[str, int]:
    """As a file and a record hold them, without limits of 0 for middle rows."""
    found = asdict(crossovers)
    return {name: rows for name, rows in found.items() if rows or name in ("packed", "kept")}


def _crossovers(entry: Any) -> Crossovers | ValueError:
    names = [field.name for field in fields(Crossovers)]
    found = {name: entry[name] for name in names if name in entry} if isinstance(entry, dict) else {}
    if not {"packed", "kept"} <= found.keys() or any(type(rows) is not int for rows in found.values()):
        return ValueError("expected whole numbers packed and kept")  # True is an int, but not valid here
    try:
        return Crossovers(**found)
    except ValueError as error:
        return error
