"""Where `mxrot.load` puts a model: C9."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.cases.transformers_models import write_checkpoint

import mxrot


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("loading") / "out")


@pytest.mark.case("C9")
def test_load_takes_the_default_device_as_other_calls_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, told by a machine that says it has one, and has none to move anything to."""
    if torch.cuda.is_available():
        assert mxrot.load(folder).device.type == "cuda"
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            mxrot.load(folder)
    assert mxrot.load(folder, device="cpu").device.type == "cpu"


@pytest.mark.case("C9")
def test_load_takes_the_cpu_where_there_is_no_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mxrot.load(folder).device.type == "cpu"
