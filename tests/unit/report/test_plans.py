"""A plan as it is printed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.unit.checkpoint.folders import recipe
from tests.unit.planning.shapes import LLAMA_3_8B

from mxrot.planning import Machine, make_plan, rates
from mxrot.report import plan_report
from mxrot.report.plans import duration


def shown(tmp_path: Path, name: str, gpu_bytes: float | None = None, **changes: Any) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B.to_dict()))
    made = make_plan("some/model", path, recipe(name, **changes), Machine(torch.device("cpu"), gpu_bytes))
    console = Console(width=140, file=io.StringIO(), color_system=None)
    for piece in plan_report(made):
        console.print(piece, markup=False, highlight=False, soft_wrap=isinstance(piece, str))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SECONDS", 0.0)


def test_the_pieces_of_a_plan(tmp_path: Path) -> None:
    text = shown(tmp_path, "duquant++-gptq", 6e9)
    for expected in (
        "some/model with duquant++-gptq",
        "14336 x 4096",
        "16.1 GB before, 5.86 GB after: 6.98 billion weights in 4.250 bits (transforms 0.062 bits beside)",
        "Peak memory, 128 windows of 2048; an estimate",
        "GPU, on a GPU",
        "down: statistics",
        "sums over all batches",
        "Time on this machine (cpu); an estimate",
        "vLLM 0.32.0: does not run it",
        "  it has one matrix a block, and vLLM takes one a site",
        "vLLM 0.32.0 with mxrot installed: runs it; tensor parallel 1",
        "warning: the GPU will run out of memory",
        "nothing would be refused",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 140


def test_a_mixture_says_what_each_site_is_in(tmp_path: Path) -> None:
    tables = [{"sites": ["down_proj"], "format": "mxfp8_e4m3"}, {"blocks": [-2, -1], "weights": "none"}]
    lines = shown(tmp_path, "hadamard", override=tables).splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]
    assert ["o", "o_proj", "mxfp4, mxfp4", "4096 x 4096", "30", "503.3 M", "4.250"] in rows
    assert ["down", "down_proj", "mxfp8_e4m3, mxfp8_e4m3", "4096 x 14336", "30", "1,761.6 M", "8.250"] in rows
    assert ["left", "", "as they are", "", "", "436.2 M", "16.000"] in rows
    bits = (4.25 * (6979.3 - 436.2 - 1761.6) + 8.25 * 1761.6 + 16 * 436.2) / 6979.3
    assert any(f"6.98 billion weights in {bits:.2f}" in line for line in lines)


def test_a_recipe_without_text_or_transform(tmp_path: Path) -> None:
    text = shown(tmp_path, "rtn")
    assert "no calibration text" in text and "(no transforms)" in text and "vLLM 0.32.0: runs it; tensor" in text


def test_rotations_are_shown_and_a_transform_without_numbers(tmp_path: Path) -> None:
    text = shown(tmp_path, "quarot")
    assert "merged into the weights: the residual stream (hadamard) and the value heads (hadamard)" in text
    assert "(transforms without numbers)" in text


def test_terms_are_shown_from_the_largest_and_sum_up(tmp_path: Path) -> None:
    lines = shown(tmp_path, "mxrot").splitlines()
    start = next(index for index, line in enumerate(lines) if "GPU, on a GPU" in line)
    cells = [line.strip("│").split("│") for line in lines[start:]]
    peak = float(cells[0][1].split()[0])
    terms = [float(cells[0][3].split()[0])]
    for row in cells[1:]:
        if row[0].strip():
            break
        terms.append(float(row[3].split()[0]))
    assert terms[:-1] == sorted(terms[:-1], reverse=True)
    assert sum(terms) == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0.04, "0.0 s"), (19.9, "19.9 s"), (119, "119 s"), (121, "2 min"), (7200, "2 h"), (359999, "100 h")],
        (864000, "10 days"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
