"""Up to how many rows which way to compute a linear is the fastest, as it was measured.

`mxrot bench kernels --remember` measures on this device and keeps the result for it; what was measured before, on a
device of the same compute capability, stands in where nobody has.
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
"""That the product from packed codes takes."""


MOST_MIDDLE_ROWS = 1024
"""For which the product for middle rows is measured."""


@dataclass(frozen=True)
class Crossovers:
    """Up to so many rows of input, `MOST_ROWS` at most, the product from packed codes for few rows is the fastest; and
    for which the one for middle rows is, where it can be taken."""

    packed: int
    """Where weights are packed, and lifted to FP8 for more rows."""
    kept: int
    """Where they are kept in FP8."""
    few: int = 0
    """From one row more on the product for middle rows is taken, up to"""
    middle: int = 0
    """so many, where weights are packed, and"""
    middle_kept: int = 0
    """so many where they are kept in FP8; `MOST_MIDDLE_ROWS` at most. 0 for never."""

    def __post_init__(self) -> None:
        if not (0 <= self.packed <= MOST_ROWS and 0 <= self.kept <= MOST_ROWS):
            raise ValueError(f"{self}: expected 0 to {MOST_ROWS} rows")
        if not all(0 <= rows <= MOST_MIDDLE_ROWS for rows in (self.few, self.middle, self.middle_kept)):
            raise ValueError(f"{self}: expected 0 to {MOST_MIDDLE_ROWS} middle rows")


MEASURED: dict[tuple[int, int], Crossovers] = {
    (9, 0): Crossovers(packed=64, kept=16, few=8, middle=256, middle_kept=64)
}
"""By compute capability, where speed and perplexity were both measured on such a device: 9.0 on an H100, and for middle
rows on an H200."""


def file_of_crossovers() -> Path:
    return cache_folder() / "crossovers.json"


@dataclass(frozen=True)
class Found:
    """What counts on a device."""

    crossovers: Crossovers
    origin: str
    """Where it was measured."""


@cache
def crossovers_of(device: torch.device) -> Crossovers | None:
    """Those that were remembered for a device of this name, else those of its compute capability.

    Looked up once for a device: every call of a linear asks. A file that is damaged counts as none, with a warning.
    """
    found = find_crossovers(device)
    return None if found is None else found.crossovers


def find_crossovers(device: torch.device) -> Found | None:
    """The same, and where they come from; None where there is nothing to choose from, as on a CPU."""
    if device.type != "cuda":
        return None
    remembered = _remembered(torch.cuda.get_device_name(device))
    if remembered is not None:
        return Found(remembered, "this device")
    capability = torch.cuda.get_device_capability(device)
    measured = MEASURED.get(capability)
    return None if measured is None else Found(measured, f"compute capability {capability[0]}.{capability[1]}")


def remember(device: torch.device, crossovers: Crossovers) -> Path:
    """Keep them for devices of this name; the file. What it holds of other devices stays, as far as it can be read."""
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
    """By names of devices what was measured, or what is wrong with it; DamagedError for a file that is no table."""
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
        return ValueError("expected whole numbers packed and kept")  # True is none, though an instance
    try:
        return Crossovers(**found)
    except ValueError as error:
        return error
