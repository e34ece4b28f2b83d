"""Up to how many rows which way to compute a linear is the fastest, as it was measured.

`mxrot bench kernels --remember` measures on this device and keeps the result for it; what was measured before, on a
device of the same compute capability, stands in where nobody has.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from mxrot.cache import cache_folder
from mxrot.errors import ConfigError

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


@cache
def crossovers_of(device: torch.device) -> Crossovers | None:
    """Those that were remembered for a device of this name, else those of its compute capability.

    Looked up once for a device: every call of a linear asks.
    """
    return _remembered(torch.cuda.get_device_name(device)) or MEASURED.get(torch.cuda.get_device_capability(device))


def remember(device: torch.device, crossovers: Crossovers) -> Path:
    """Keep them for devices of this name; the file."""
    path = file_of_crossovers()
    path.parent.mkdir(parents=True, exist_ok=True)
    found = _read(path) | {torch.cuda.get_device_name(device): asdict(crossovers)}
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    crossovers_of.cache_clear()
    return path


def _remembered(name: str) -> Crossovers | None:
    path = file_of_crossovers()
    found = _read(path).get(name)
    try:
        return None if found is None else Crossovers(int(found["packed"]), int(found["kept"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _not_ours(path) from error


def _read(path: Path) -> dict[str, dict[str, int]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise _not_ours(path) from error
    if not isinstance(found, dict):
        raise _not_ours(path)
    return found


def _not_ours(path: Path) -> ConfigError:
    return ConfigError(f"{path}: is not what `mxrot bench kernels --remember` writes; delete it, or measure again")
