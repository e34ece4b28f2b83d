"""The peak memory of a piece of code: allocated on a GPU, resident in main memory otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_HIGH_WATER = "5"
"""The value that resets the largest resident size (Linux, Documentation/filesystems/proc.rst)."""


@dataclass
class Peak:
    """The peak, set at the end."""

    bytes: int | None = None
    """The peak in bytes. None if the system does not report it."""


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[Peak]:
    """The peak while open. On a CPU it is that of the whole process, Python and torch included, reported on Linux
    only."""
    found, device = Peak(), torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device)
        return
    is_reset = _reset()
    yield found
    found.bytes = _high_water() if is_reset else None


def _reset() -> bool:
    """True if the peak could be reset."""
    try:
        _RESET.write_text(_HIGH_WATER, encoding="ascii")
    except OSError:
        return False
    return True


def _high_water() -> int | None:
    """The largest resident size, in bytes."""
    try:
        line = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return None if line is None else 1024 * int(line[1])
