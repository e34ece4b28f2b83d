"""What was measured on a device is found again, for that device alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mxrot.errors import MxrotWarning
from mxrot.kernels import crossovers
from mxrot.kernels.crossovers import Crossovers, Found, crossovers_of, file_of_crossovers, find_crossovers, remember

GPU = torch.device("cuda")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("MXROT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(crossovers, "MEASURED", {(9, 0): Crossovers(4, 2)})
    call_it(monkeypatch, "one")
    yield monkeypatch
    crossovers_of.cache_clear()


def call_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    crossovers_of.cache_clear()


def test_what_is_remembered_goes_before_what_others_measured(device: pytest.MonkeyPatch) -> None:
    assert crossovers_of(GPU) == Crossovers(4, 2)
    assert remember(GPU, Crossovers(64, 16)) == file_of_crossovers()
    assert crossovers_of(GPU) == Crossovers(64, 16)
    call_it(device, "another")
    assert crossovers_of(GPU) == Crossovers(4, 2)
    remember(GPU, Crossovers(8, 0))
    call_it(device, "one")
    assert crossovers_of(GPU) == Crossovers(64, 16)
    assert [path.name for path in file_of_crossovers().parent.iterdir()] == ["crossovers.json"]


def test_a_device_is_looked_up_once(device: pytest.MonkeyPatch) -> None:
    """And again where something new is remembered."""
    asked: list[str] = []
    device.setattr(torch.cuda, "get_device_name", lambda device=None: (asked.append("name"), "one")[1])
    assert crossovers_of(GPU) == crossovers_of(GPU) == Crossovers(4, 2) and len(asked) == 1
    remember(GPU, Crossovers(1, 1))
    assert crossovers_of(GPU) == Crossovers(1, 1)


DAMAGED = [
    "",
    "[]",
    "nul",
    '{"one": 3}',
    '{"one": {"packed": 3}}',
    '{"one": {"packed": 129, "kept": 0}}',
    '{"one": {"packed": true, "kept": 0}}',
    '{"one": {"packed": 1.5, "kept": 0}}',
    "[" * 100000,
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_file_that_is_something_else_counts_as_none(device: pytest.MonkeyPatch, text: str) -> None:
    file_of_crossovers().parent.mkdir()
    file_of_crossovers().write_text(text)
    with pytest.warns(MxrotWarning, match=r"crossovers\.json.* `mxrot bench kernels --remember` writes") as said:
        assert crossovers_of(GPU) == crossovers_of(GPU) == Crossovers(4, 2)
    assert len(said) == 1
    remember(GPU, Crossovers(8, 8))
    assert crossovers_of(GPU) == Crossovers(8, 8)


def test_a_folder_in_its_place(device: pytest.MonkeyPatch) -> None:
    file_of_crossovers().mkdir(parents=True)
    with pytest.warns(MxrotWarning, match="is a folder"):
        assert crossovers_of(GPU) == Crossovers(4, 2)


def test_bytes_that_are_no_text(device: pytest.MonkeyPatch) -> None:
    file_of_crossovers().parent.mkdir()
    file_of_crossovers().write_bytes(b"\xff\xfe\x00")
    with pytest.warns(MxrotWarning, match="not UTF-8"):
        assert crossovers_of(GPU) == Crossovers(4, 2)


def test_other_devices_stay_when_one_is_damaged(device: pytest.MonkeyPatch) -> None:
    """A damaged entry of another device is nothing to this one."""
    file_of_crossovers().parent.mkdir()
    file_of_crossovers().write_text('{"one": {"packed": 9, "kept": 9}, "two": 5, "three": {"packed": 7, "kept": 7}}')
    assert crossovers_of(GPU) == Crossovers(9, 9)
    remember(GPU, Crossovers(1, 1))
    assert json.loads(file_of_crossovers().read_text()) == {
        "one": {"packed": 1, "kept": 1},
        "three": {"packed": 7, "kept": 7},
    }


def test_where_they_come_from(device: pytest.MonkeyPatch) -> None:
    assert find_crossovers(GPU) == Found(Crossovers(4, 2), "compute capability 9.0")
    remember(GPU, Crossovers(8, 8))
    assert find_crossovers(GPU) == Found(Crossovers(8, 8), "this device")
    device.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    call_it(device, "two")
    assert find_crossovers(GPU) is None and find_crossovers(torch.device("cpu")) is None
