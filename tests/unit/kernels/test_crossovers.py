"""What was measured on a device is found again, for that device alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mxrot.errors import ConfigError
from mxrot.kernels import crossovers
from mxrot.kernels.crossovers import Crossovers, crossovers_of, file_of_crossovers, remember

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


@pytest.mark.parametrize(
    "text", ["", "[]", '{"one": 3}', '{"one": {"packed": 3}}', '{"one": {"packed": 129, "kept": 0}}']
)
def test_a_file_that_is_something_else(device: pytest.MonkeyPatch, text: str) -> None:
    file_of_crossovers().parent.mkdir()
    file_of_crossovers().write_text(text)
    with pytest.raises(ConfigError, match=r"crossovers\.json: is not what .* writes; delete it"):
        crossovers_of(GPU)
