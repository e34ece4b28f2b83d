"""Give memory that was freed back to the system.

glibc keeps what lies between tensors that are still alive, and takes more from the system for the next block where the
pieces do not fit: without this, main memory grows with the number of blocks. It is asked after each site. Mapping every
tensor by itself instead (M_MMAP_THRESHOLD) saves a little more memory and takes twice the time, in page faults
(docs/log.md). musl, macOS and Windows give back by themselves, or cannot be asked.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Nothing where the system's C library has no such function."""
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
