"""Return freed memory to the system.

glibc keeps the free memory between tensors that are still alive. If its pieces are too small for the next block, it
takes more from the system. Without this module, main memory therefore grows with the number of blocks. Memory is
returned after each site. Mapping every tensor by itself instead (M_MMAP_THRESHOLD) saves a little more memory, but its
page faults double the time (docs/log.md). musl, macOS and Windows return memory by themselves or offer no such
function.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Return freed memory. Does nothing if the system's C library has no function for it."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
