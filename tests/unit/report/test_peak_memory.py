"""The peak is that of what happens inside, not of what was before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mxrot.report import peak_memory as measured
from mxrot.report.peak_memory import peak_memory

MEBIBYTE = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells it")
def test_the_peak_is_of_what_happens_inside() -> None:
    def filled(size: int) -> None:
        torch.ones(size * MEBIBYTE, dtype=torch.uint8)

    filled(400)
    with peak_memory("cpu") as small:
        filled(1)
    with peak_memory("cpu") as large:
        filled(300)
    assert small.bytes is not None and large.bytes is not None
    assert 250 * MEBIBYTE < large.bytes - small.bytes < 390 * MEBIBYTE


def test_nothing_is_said_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measured, "_RESET", tmp_path / "nowhere" / "clear_refs")
    with peak_memory("cpu") as peak:
        pass
    assert peak.bytes is None
