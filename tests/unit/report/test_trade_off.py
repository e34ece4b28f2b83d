"""The picture of a comparison: every recipe has its name, names do not touch, and files are what they are called."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

import pytest
from tests.unit.report.test_rows import ORIGINAL, ROW, run
from typer.testing import CliRunner

from mxrot.cli import app
from mxrot.errors import ConfigError
from mxrot.report import ComparedRow, picture_file
from mxrot.report.trade_off import check_plot, spread


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([90, 50, 20], [90, 50, 20]),
        ([90, 85, 80], [90, 80, 70]),
        ([120, 119], [100, 90]),
        ([30, 12, 11, 10], [35, 25, 15, 5]),
        ([], []),
    ],
)
def test_names_are_a_line_apart(wanted: list[float], expected: list[float]) -> None:
    found = spread(wanted, 10, top=100, bottom=5)
    assert found == pytest.approx(expected)
    assert all(above - below >= 10 - 1e-9 for above, below in itertools.pairwise(found))


def test_the_picture_names_what_ran() -> None:
    pytest.importorskip("matplotlib")
    rows = [
        ComparedRow("FP16", (ORIGINAL,)),
        ROW,
        *(ComparedRow(f"number-{number}", (run(2.1, 3.1 + number / 5, 0.1),), ORIGINAL) for number in range(12)),
        ComparedRow("refused", reason="cannot be taken"),
    ]
    drawn = picture_file(rows, "a title", "svg").decode()
    assert drawn == picture_file(rows, "a title", "svg").decode()
    names = [f"{row.recipe}  {row.ratio().value:.3f}" for row in rows[1:-1]]
    assert all(name in drawn for name in names) and "a title" in drawn
    assert "FP16" not in drawn and "refused" not in drawn
    heights = [float(y) for y in re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>(?:mxrot|number)', drawn)]
    assert len(heights) == 13 and all(below - above >= 12.9 for above, below in itertools.pairwise(sorted(heights)))
    assert picture_file(rows[:2], "one", "png").startswith(b"\x89PNG")


def test_without_matplotlib_a_page_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for option in ("--html", "--plots"):
        result = CliRunner().invoke(app, ["compare", "demo", option, str(tmp_path / "x")])
        assert result.exit_code == 2
        assert f"{option} needs the package matplotlib: pip install 'mxrot[report]'" in result.stderr


def test_what_cannot_be_drawn_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_plot(None)
    with pytest.raises(ConfigError, match=r"ends in .png or .svg"):
        check_plot(tmp_path / "picture.pdf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--plot needs the package matplotlib: pip install 'mxrot\[report\]'"):
        check_plot(tmp_path / "picture.png")
