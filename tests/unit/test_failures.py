"""What the machine lacked is told by types and numbers, and never by a part of a message."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from mxrot.errors import DescriptorsError, DiskFullError, FamilyError, MachineError, OutOfMemoryError
from mxrot.failures import machine_failure, named_failures

TOO_MANY = "/m/model-00001.safetensors> in read-only mode: Too many open files (24)"


def raised_by_torch() -> BaseException:
    """What torch raises for a tensor that no machine holds."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58, dtype=torch.uint8)
    return caught.value


def test_a_tensor_that_does_not_fit() -> None:
    found = machine_failure(raised_by_torch(), "model.layers.3")
    assert isinstance(found, OutOfMemoryError) and isinstance(found, MemoryError) and found.exit_code == 1
    size = (1 << 58) / 1e6
    assert str(found).startswith(
        f"model.layers.3: out of memory ({size:.1f} MB more wanted); take fewer or shorter windows"
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), OutOfMemoryError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB"), OutOfMemoryError),
        (OSError(errno.ENOMEM, "?"), OutOfMemoryError),
        (RuntimeError("std::bad_alloc"), OutOfMemoryError),
        (RuntimeError("unable to mmap 12 bytes from file </m/a>: Cannot allocate memory (12)"), OutOfMemoryError),
        (RuntimeError(f"unable to open file <{TOO_MANY}"), DescriptorsError),
        (ImportError("/a.so: failed to map segment from shared object", path="/a.so"), OutOfMemoryError),
        (OSError(errno.EMFILE, "?", "/m/a"), DescriptorsError),
        (OSError(errno.ENFILE, "?"), DescriptorsError),
        (Exception("Too many open files (os error 24)"), DescriptorsError),
        (OSError(errno.ENOSPC, "?"), DiskFullError),
        (OSError(errno.EDQUOT, "?"), DiskFullError),
        (RuntimeError("can't start new thread"), MachineError),
        (BlockingIOError(errno.EAGAIN, "?"), MachineError),
    ],
)
def test_kinds(error: Exception, kind: type[Exception]) -> None:
    found = machine_failure(error)
    assert type(found) is kind and found.exit_code == 1  # type: ignore[union-attr]


def test_how_much_a_gpu_was_asked_for() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79.1 GiB")
    assert str(machine_failure(error)).startswith("out of GPU memory (2.00 GiB more wanted); ")


def test_a_file_that_is_there_and_said_to_be_missing(tmp_path: Path) -> None:
    """safetensors says so where it had no descriptor left."""
    there = tmp_path / "model.safetensors"
    there.touch()
    assert isinstance(machine_failure(FileNotFoundError(f"No such file or directory: {there}")), DescriptorsError)
    assert machine_failure(FileNotFoundError(f"No such file or directory: {tmp_path / 'other'}")) is None
    assert machine_failure(FileNotFoundError("No such file or directory: a\0b")) is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("std::bad_alloc"),
        RuntimeError("/models/std::bad_alloc: no such model"),
        RuntimeError(f"/m/{raised_by_torch.__name__}: DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("unable to open file </m/Too many open files (24)>: Permission denied (13)"),
        RuntimeError("unable to open file </m/a>: No space (28)"),
        Exception("/m/Too many open files (os error 24)"),
        ImportError("/a.so: undefined symbol: failed to map segment from shared object", path="/a.so"),
        FamilyError("out of memory"),
        OSError(errno.EACCES, "Cannot allocate memory"),
    ],
)
def test_words_alone_decide_nothing(error: Exception) -> None:
    assert machine_failure(error) is None


def test_the_reason_behind_another_error() -> None:
    try:
        try:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/m/config.json")
        except OSError as error:
            raise FamilyError("/m/config.json: cannot be read") from error
    except FamilyError as error:
        found = machine_failure(error)
    assert isinstance(found, DescriptorsError) and "/m/config.json: too many open files" in str(found)


def test_errors_that_lead_to_each_other() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert machine_failure(first) is None


def test_a_name_for_where() -> None:
    with pytest.raises(OutOfMemoryError, match=r"^model.layers.1: out of memory"), named_failures("model.layers.1"):
        raise MemoryError
    with pytest.raises(ValueError, match=r"^other$"), named_failures("model.layers.1"):
        raise ValueError("other")


def test_the_innermost_name_stays() -> None:
    with pytest.raises(OutOfMemoryError, match=r"^inner: "), named_failures("outer"), named_failures("inner"):
        raise MemoryError


def test_errors_go_through_pickle() -> None:
    found = pickle.loads(pickle.dumps(OutOfMemoryError("out of memory")))
    assert type(found) is OutOfMemoryError and str(found) == "out of memory"


def test_threads_say_what_is_expected_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message that is compared is the one of this Python."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("can't start new thread")

    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    monkeypatch.setattr(threading, name, refuse)
    with pytest.raises(RuntimeError) as caught:
        threading.Thread(target=print).start()
    assert isinstance(machine_failure(caught.value), MachineError)
