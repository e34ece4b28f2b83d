"""Where states between two passes lie."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mxrot.calibration import placement
from mxrot.calibration.placement import KEPT_TIMES, MOST_OF_HOST, Placement
from mxrot.errors import DiskFullError

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(placement.tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_file_without_a_name_holds_the_same_bits(folder: Path, dtype: torch.dtype) -> None:
    place = Placement(CPU, True, folder)
    given = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = place.put((given, None, given[:0]))
    assert list(folder.iterdir()) == []
    assert kept[0].data_ptr() != given.data_ptr() and kept[1] is None and kept[2].shape == (0, 5, 7)
    assert torch.equal(place.get(kept)[0], given) and place.get(kept)[0].dtype == dtype


def test_what_takes_more_than_half_of_the_memory_lies_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "available_memory", lambda: 1e6)
    monkeypatch.setattr(placement, "memory_of", lambda device: None if device.type == "cpu" else 24e9)
    most = int(MOST_OF_HOST * 1e6 / KEPT_TIMES)
    assert Placement.of_states(CPU, most) == Placement(CPU)
    assert Placement.of_states(CPU, most + 1) == Placement(CPU, True, folder)
    assert Placement.of_states(CPU, most // 2 + 1, processes=2).folder == folder
    assert Placement.of_states(torch.device("cuda"), most + 1) == Placement(torch.device("cuda"))  # stays on the GPU
    monkeypatch.setattr(placement, "available_memory", lambda: None)
    assert Placement.of_states(CPU, 10 * most) == Placement(CPU)


def test_states_stay_on_a_gpu_that_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of its memory holds them six times; on any GPU 1 GiB of them stay."""
    device = torch.device("cuda")
    for memory, most in ((150e9, 5_000_000_000), (24e9, 2**30)):
        monkeypatch.setattr(placement, "memory_of", lambda _, memory=memory: memory)
        assert Placement.of_states(device, most) == Placement(device)
        assert Placement.of_states(device, most + 1).is_on_host


def test_a_disk_without_room_is_told_before_anything_is_computed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "available_memory", lambda: 1e6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    with pytest.raises(
        DiskFullError, match=r"take up to 6\.0 GB, more than half .* 0\.0 GB are free on this disk; set"
    ):
        Placement.of_states(CPU, 10**9)


def test_a_disk_that_fills_up_is_an_error_and_no_crash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"no room for states between decoder blocks .*No space left"):
        Placement(CPU, True, folder).put(torch.ones(4))
    assert list(folder.iterdir()) == []
