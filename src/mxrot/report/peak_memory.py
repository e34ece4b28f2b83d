"""The most memory that something takes: allocated on a GPU, resident in main memory otherwise."""

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
"""What resets the largest resident size (Linux, Documentation/filesystems/proc.rst)."""


@dataclass
class Peak:
    """What was seen, once it is over."""

    bytes: int | None = None
    """None where the system does not tell."""


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[Peak]:
    """The peak while open. On a CPU it is of the whole process, Python and torch included, and only Linux tells it."""
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
    """Whether the count could be started again."""
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
