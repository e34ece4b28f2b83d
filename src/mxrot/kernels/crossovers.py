"""Up to how many rows which way to compute a linear is the fastest, as it was measured.

`mxrot bench kernels --remember` measures on this device and keeps the result for it; what was measured before, on a
device of the same compute capability, stands in where nobody has.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mxrot.cache import cache_folder
from mxrot.documents import read_json
from mxrot.errors import DamagedError, MxrotWarning

MOST_ROWS = 128
"""That the product from packed codes takes."""


@dataclass(frozen=True)
class Crossovers:
    """Up to so many rows of input, `MOST_ROWS` at most, the product from packed codes is the fastest."""

    packed: int
    """Where weights are packed, and lifted to FP8 for more rows."""
    kept: int
    """Where they are kept in FP8."""

    def __post_init__(self) -> None:
        if not (0 <= self.packed <= MOST_ROWS and 0 <= self.kept <= MOST_ROWS):
            raise ValueError(f"{self}: expected 0 to {MOST_ROWS} rows")


MEASURED: dict[tuple[int, int], Crossovers] = {(9, 0): Crossovers(packed=64, kept=16)}
"""By compute capability, where speed and perplexity were both measured on such a device: 9.0 on an H100."""


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
    kept = {name: asdict(found) for name, found in entries.items() if isinstance(found, Crossovers)}
    unfinished = path.with_suffix(f".{os.getpid()}")
    table = kept | {torch.cuda.get_device_name(device): asdict(crossovers)}
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


def _crossovers(entry: Any) -> Crossovers | ValueError:
    packed, kept = (entry.get("packed"), entry.get("kept")) if isinstance(entry, dict) else (None, None)
    if type(packed) is not int or type(kept) is not int:  # True is none, though an instance
        return ValueError("expected whole numbers packed and kept")
    try:
        return Crossovers(packed, kept)
    except ValueError as error:
        return error
