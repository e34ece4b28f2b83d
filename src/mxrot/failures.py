"""What the machine did not have: memory, descriptors, room on the disk, threads.

Python and torch say so in many ways; here they become one error each, which says what did not fit and what to do. What
happened is told by the type of an error and by the number that the system gave (errno). Where a library gives neither,
its whole message has to be one that only this failure has: no name of a file can look like it.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mxrot.errors import DescriptorsError, DiskFullError, MachineError, MxrotError, OutOfMemoryError

_CPU_ALLOCATOR = re.compile(
    r"\[enforce fail at alloc_cpu\.cpp:\d+\] [^/\\]{0,40}DefaultCPUAllocator: can't allocate memory: "
    r"you tried to allocate (?P<bytes>\d+) bytes\. Error code \d+ \([\w ]+\)\s*"
)
"""torch gives its CPU allocator's failure no type (c10/core/impl/alloc_cpu.cpp): the whole message, from its start."""
_MAPPING = re.compile(
    r"unable to (?:mmap \d+ bytes from|open|read|resize|stat) file <.*>[\w -]*: "
    r"(?P<text>[\w ]+) \((?P<number>\d+)\)"
)
"""The same for files that it maps (aten/src/ATen/MapAllocator.cpp)."""
_RUST = re.compile(r"(?P<text>[\w ]+) \(os error (?P<number>\d+)\)")
"""What Rust's standard library makes of errno, where nothing stands before it."""
_WITHOUT_TYPE = {
    "std::bad_alloc": errno.ENOMEM,  # C++, by way of torch
    "can't start new thread": errno.EAGAIN,  # Python's threading
}
"""Whole messages of a RuntimeError."""
_CUDA_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation"""
_UNOPENED = "No such file or directory: "
"""How safetensors begins to say that it could not open a file, whatever the reason."""

LESS_MEMORY = (
    "take fewer or shorter windows (--samples, --windows, --seq-len) or another --device; "
    "`mxrot plan` says what quantizing takes"
)


def machine_failure(error: BaseException | None, where: str = "") -> MachineError | DiskFullError | None:
    """What the machine lacked, if that is why `error` was raised, or what it came from; None for every other error.

    `where` says what was being done.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        found = _failure(error, f"{where}: " if where else "")
        if found is not None:
            return found
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextmanager
def named_failures(where: str) -> Iterator[None]:
    """While open, what the machine lacks is raised as a MachineError, or DiskFullError, that says `where`."""
    try:
        yield
    except MxrotError:
        raise
    except Exception as error:
        found = machine_failure(error, where)
        if found is None:
            raise
        raise found from error


def _failure(error: BaseException, where: str) -> MachineError | DiskFullError | None:
    if isinstance(error, (MachineError, DiskFullError)):
        return error
    if _is_gpu_memory(error):
        return OutOfMemoryError(f"{where}out of GPU memory{_asked(str(error))}; {LESS_MEMORY}")
    cpu = _CPU_ALLOCATOR.fullmatch(str(error)) if type(error) is RuntimeError else None
    if cpu is not None:
        return OutOfMemoryError(f"{where}out of memory ({int(cpu['bytes']) / 1e6:.1f} MB more wanted); {LESS_MEMORY}")
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"{where}out of memory; {LESS_MEMORY}")
    return _by_number(_number(error), error, where)


def _by_number(number: int | None, error: BaseException, where: str) -> MachineError | DiskFullError | None:
    name = getattr(error, "filename", None)
    what = f"{where}{name}: " if name else where
    if number == errno.ENOMEM:
        return OutOfMemoryError(f"{what}out of memory; {LESS_MEMORY}")
    if number in (errno.EMFILE, errno.ENFILE):
        return DescriptorsError(f"{what}too many open files; raise the limit, as in `ulimit -n 4096`, and try again")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"{what}no space left on the device; make room, and try again")
    if number == errno.EAGAIN:
        return MachineError(
            f"{what}no thread can start; end other programs, or raise `ulimit -u` (threads) or `ulimit -v` (memory)"
        )
    return None


def _number(error: BaseException) -> int | None:
    """errno, also where a library in Rust or C++ keeps it for itself."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return _reason(Path(text.removeprefix(_UNOPENED)))
    if isinstance(error, ImportError):
        return errno.ENOMEM if text == f"{error.path}: failed to map segment from shared object" else None
    if type(error) not in (RuntimeError, Exception):
        return None
    found = _MAPPING.fullmatch(text) or _RUST.fullmatch(text)
    if found is not None and found["text"] == os.strerror(int(found["number"])):
        return int(found["number"])
    return _WITHOUT_TYPE.get(text)


def _reason(path: Path) -> int | None:
    """Why a file that is there could not be opened: if it can be now, there were no descriptors a moment ago."""
    try:
        with path.open("rb"):
            return errno.EMFILE
    except OSError as error:
        return error.errno
    except ValueError:  # a zero byte in what is no path
        return None


def _is_gpu_memory(error: BaseException) -> bool:
    """Did a GPU's memory run out? Without loading torch: who has not loaded it got no such error."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    is_known = isinstance(error, getattr(torch, "OutOfMemoryError", ()))
    return is_known or (
        isinstance(error, getattr(torch, "AcceleratorError", ()))
        and getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
    )


def _asked(message: str) -> str:
    """What was asked for, as torch says it."""
    found = re.search(r"Tried to allocate ([\d.]+ [KMGT]?i?B)", message)
    return f" ({found[1]} more wanted)" if found else ""
