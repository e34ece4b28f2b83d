"""One tiny quantized model, and what its report shows."""

from __future__ import annotations

import pytest
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import recipe

import mxrot
from mxrot.report import Contents, page, pictures
from mxrot.report.measuring import Request, gather

UNKIND = "<script>alert('x')</script> & \"quotes\" {brace} $dollar"
"""What may be in a name, and must not become part of a page."""


@pytest.fixture(scope="session")
def report_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, a text, and a checkpoint whose recipe has an unkind summary."""
    root = tmp_path_factory.mktemp("report")
    model = write_tiny_model(root / "tiny")
    text = root / "words.txt"
    text.write_text("".join(f"the number {number} follows {number - 1}; " for number in range(80)))
    chosen = recipe("duquant++", summary=UNKIND)
    mxrot.quantize(model, chosen, root / "out", calib=str(text), samples=4, seq_len=32, device="cpu")
    return {"model": str(model), "text": str(text), "checkpoint": str(root / "out")}


@pytest.fixture(scope="session")
def report_contents(report_folders: dict[str, str]) -> Contents:
    """Measured against the original."""
    request = Request(
        report_folders["checkpoint"], report_folders["model"], [report_folders["text"]], windows=3, seq_len=32
    )
    return gather(request, "cpu")


@pytest.fixture(scope="session")
def report_page(report_contents: Contents) -> str:
    pytest.importorskip("matplotlib")
    return page(report_contents, pictures(report_contents))
