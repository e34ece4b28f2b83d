"""Failures of the machine: not enough memory, file descriptors, disk space or threads.

Python and torch report these in many ways. Here each becomes one error that says what did not fit and what to do. The
type of an error and its errno tell what happened. If a library gives neither, its whole message must match a text that
only this failure has, so that no file name can look like it.
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
"""The whole message of torch's CPU allocator, from its start. Its error has no type of its own
(c10/core/impl/alloc_cpu.cpp)."""
_MAPPING = re.compile(
    r"unable to (?:mmap \d+ bytes from|open|read|resize|stat) file <.*>[\w -]*: "
    r"(?P<text>[\w ]+) \((?P<number>\d+)\)"
)
"""The same for files that torch maps (aten/src/ATen/MapAllocator.cpp)."""
_RUST = re.compile(r"(?P<text>[\w ]+) \(os error (?P<number>\d+)\)")
"""The text that Rust's standard library makes from errno, with nothing before it."""
_WITHOUT_TYPE = {
    "std::bad_alloc": errno.ENOMEM,  # C++, through torch
    "can't start new thread": errno.EAGAIN,  # Python's threading
}
"""Whole messages of a RuntimeError, with their errno."""
_CUDA_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""
_UNOPENED = "No such file or directory: "
"""The start of safetensors' message when it cannot open a file, for any reason."""

LESS_MEMORY = (
    "take fewer or shorter windows (--samples, --windows, --seq-len) or another --device; "
    "`mxrot plan` says what quantizing takes"
)


def machine_failure(error: BaseException | None, where: str = "") -> MachineError | DiskFullError | None:
    """The machine failure behind `error` or one of its causes. None for every other error.

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
    """While open, a machine failure is raised as a MachineError or DiskFullError that says `where`."""
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
    """The errno of an error, also if a library in Rust or C++ gives it only in its message."""
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
    """Why an existing file could not be opened. If it can be opened now, there were no free descriptors before."""
    try:
        with path.open("rb"):
            return errno.EMFILE
    except OSError as error:
        return error.errno
    except ValueError:  # a null byte in a text that is not a path
        return None


def _is_gpu_memory(error: BaseException) -> bool:
    """True if a GPU's memory ran out. torch is not loaded for this: without it there is no such error."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    is_known = isinstance(error, getattr(torch, "OutOfMemoryError", ()))
    return is_known or (
        isinstance(error, getattr(torch, "AcceleratorError", ()))
        and getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
    )


def _asked(message: str) -> str:
    """The amount of memory that was requested, as torch's message gives it."""
    found = re.search(r"Tried to allocate ([\d.]+ [KMGT]?i?B)", message)
    return f" ({found[1]} more wanted)" if found else ""
