"""The page of a comparison: every row and picture, one file, nothing that comes from outside unescaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.unit.report.conftest import UNKIND
from tests.unit.report.test_html import Reader
from tests.unit.report.test_rows import ORIGINAL, ROW, run

from mxrot.report import ComparedRow, Comparison, compared_page, compared_pictures

pytest.importorskip("matplotlib")
ERRORS = {"weight_errors": [0.1, 0.2], "output_errors": [0.3, 0.4]}
ROWS = [
    ComparedRow("FP16", (ORIGINAL,)),
    ComparedRow("good", (run(2.05, 3.05, 0.01, **ERRORS),), ORIGINAL, checkpoint="there/good", recipe_toml="x = 1"),
    ROW,
    ComparedRow("rtn", reason="model.layers.3: the reason"),
]


def written(rows: Sequence[ComparedRow], **changes: object) -> str:
    found = Comparison("demo", rows, [], "mxrot compare demo", "cpu", {"torch": "2"}, "2026-01-02 03:04 UTC")
    return compared_page(replace(found, **changes), compared_pictures(rows, "a title"))  # type: ignore[arg-type]


def test_shows_every_row_and_every_picture() -> None:
    drawn = compared_pictures(ROWS, "a title")
    assert list(drawn) == ["ratio", "kl", "agreement", "ratio-a", "ratio-b", "weight_errors", "output_errors"]
    read = Reader(written(ROWS))
    assert read.open == [] and read.tags.count("svg") == len(drawn) and read.tags.count("script") == 1
    for words in ("good", "there/good", "mxrot", f"{ROW.ratio().value:.4f}", "the reason", "x = 1", "2026-01-02"):
        assert words in read.text
    links = [value for name, value in read.attributes if name == "download"]
    assert links == [f"{name}.csv" for name in drawn]
    assert not [
        v for name, v in read.attributes if name in ("href", "src") and not (v or "").startswith(("#", "data:"))
    ]


def test_what_is_far_from_the_best_is_marked() -> None:
    page = written(ROWS)
    far = re.findall(r'<td class="far" data-value="([\d.]+)"', page)
    assert [float(value) for value in far] == [ROW.ratio().value]


def test_the_numbers_of_pictures_are_those_of_the_rows() -> None:
    drawn = compared_pictures(ROWS, "a title")
    kl, agreement = ROW.kl(), ROW.agreement()
    assert kl is not None and agreement is not None
    assert list(drawn["kl"].sheet.rows[1]) == ["mxrot", kl.value, kl.error]
    assert list(drawn["agreement"].sheet.rows[1]) == ["mxrot", 100 * agreement.value, 100 * (agreement.error or 0)]
    assert list(drawn["weight_errors"].sheet.rows) == [["good", 0, 0.1], ["good", 1, 0.2]]


def test_what_comes_from_outside_is_escaped() -> None:
    row = ComparedRow(UNKIND, (run(2.1, 3.1, 0.1),), ORIGINAL, checkpoint=UNKIND, recipe_toml=UNKIND)
    page = written([ROWS[0], row], model=UNKIND, command=UNKIND, device=UNKIND, versions={UNKIND: UNKIND})
    assert page.count("<script") == 1 and Reader(page).text.count(UNKIND) >= 7


def test_without_kl_and_without_runs() -> None:
    plain = [ROWS[0], ComparedRow("rtn", (replace(run(2.1, 3.1, 0.1), divergence={}),), ORIGINAL)]
    assert "kl" not in compared_pictures(plain, "a title") and Reader(written(plain)).open == []
    assert compared_pictures([ROWS[0], ROWS[3]], "a title") == {}
