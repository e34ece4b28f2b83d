"""The table of a comparison fits into 100 columns, whatever is in it; and CSV holds every digit."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from rich.console import Console
from tests.unit.report.test_rows import ORIGINAL, QUANTIZED, ROW, apart, run, scored

from mxrot.evaluation import Perplexity
from mxrot.report import ComparedRow, Run, csv_text, remarks, side_by_side

ROWS = [ComparedRow("FP16", (ORIGINAL,)), ROW, ComparedRow("rtn", reason="model.layers.3: the reason")]


def lines(rows: list[ComparedRow]) -> list[str]:
    console = Console(width=200, file=io.StringIO(), color_system=None)
    for table in side_by_side(rows, "title"):
        console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace(" +", "+").split("  ") if cell.strip()]


def test_one_text_and_one_seed() -> None:
    quantized = Run(QUANTIZED, {"a": scored(2.5)}, 0, 12.34, 1_234_000_000, {"a": apart(0.123456)})
    original = Run(ORIGINAL.size, {"a": scored(2.0)})
    shown = lines([ComparedRow("FP16", (original,)), ComparedRow("rtn", (quantized,), original)])
    assert cells(shown[-2]) == ["FP16", "7.39", "1", "16", "16"]
    assert cells(shown[-1]) == ["rtn", "12.18", "1.6487", "0.1235", "50.0", "4.25+.03", "16", "12.3", "1.23"]


def test_errors_over_seeds_and_rows_without_figures() -> None:
    mxrot, rtn = lines(ROWS)[-2:]
    assert cells(mxrot) == [
        *("mxrot", "9.07+-.90", "24.66+-2.46", "1.2214", "0.300+-.150", "50.0", "4.25+.03", "16", "3.0", "0.00"),
    ]
    assert cells(rtn) == ["rtn", "-", "-", "-"]
    said = remarks(ROWS)
    assert "+- one standard error over 2 seeds" in said
    assert "rtn has no figures: model.layers.3: the reason" in said


def test_seeds_that_were_not_run_are_said() -> None:
    row = ComparedRow("rtn", (run(2.1, 3.1, 0.1), run(2.1, 3.1, 0.1, 1)), ORIGINAL, is_alike=True)
    said = remarks([*ROWS, row])
    assert "seeds 0 and 1 gave the same figures to the last bit, and no others were run: rtn" in said
    many = [ComparedRow(f"a-long-name-{number}", row.runs, ORIGINAL, is_alike=True) for number in range(20)]
    assert max(map(len, remarks([ROWS[0], *many]))) <= 100


def wide_row(name: str, texts: int, kl: float = 11.7, nll: float = 8.9) -> ComparedRow:
    """Thousands of everything, on two seeds."""
    names = [f"wikitext-{number}" for number in range(texts)]
    original = Run(ORIGINAL.size, {text: scored(2.0) for text in names})
    runs = tuple(
        Run(
            QUANTIZED,
            {text: scored(nll + 0.1 * seed) for text in names},
            seed,
            123456.7,
            123 * 10**9,
            {text: apart(kl * (1 + seed)) for text in names},
        )
        for seed in range(2)
    )
    return ComparedRow(name, runs, original)


@pytest.mark.parametrize("texts", [1, 2, 3, 6])
def test_a_table_has_at_most_100_columns(texts: int) -> None:
    original = ComparedRow("FP16", (wide_row("x", texts).original,))  # type: ignore[arg-type]
    rows = [
        original,
        wide_row("good", texts, 0.0412, 4.55),
        wide_row("fair", texts, 0.5, 5.6),
        wide_row("duquant++-released-gptq", texts),
        wide_row("rtn", texts),
        wide_row("x", texts, 0.0412),
    ]
    shown = lines(rows)
    tables = max(len(line) for line in shown)
    assert tables <= 100, "\n".join(shown)
    assert all(any(f"wikitext-{number}" in line for line in shown) for number in range(texts))


def test_a_narrow_terminal_has_narrow_tables() -> None:
    """Perplexities have a table of their own; every figure is still there."""
    original = ComparedRow("FP16", (wide_row("x", 1).original,))  # type: ignore[arg-type]
    rows = [original, ComparedRow("duquant++-gptq", wide_row("x", 1, 0.0412, 4.55).runs[:1], original.runs[0])]
    tables = side_by_side(rows, "some model", 80)
    assert len(tables) == 2 and len(side_by_side(rows, "some model")) == 1
    console = Console(width=200)
    assert max(console.measure(table).maximum for table in tables) <= 80
    figures = [
        {cell for table in chosen for column in table.columns[1:] for cell in column.cells}
        for chosen in (tables, side_by_side(rows, "some model"))
    ]
    assert figures[0] == figures[1]


def test_with_caches_the_agreement_goes_below_where_there_is_no_room() -> None:
    cache = {"ratio": 0.27, "tokens": 8192}
    rows = [
        replace(row, runs=tuple(replace(each, cache=cache) for each in row.runs))
        for row in (wide_row("duquant++-released-gptq", 1), wide_row("fair", 1, 0.5, 5.6))
    ]
    shown = lines(rows)
    assert max(map(len, shown)) <= 100
    below = shown[shown.index(next(line for line in shown if line.strip() == "Top-1")) :]
    assert any(cells(line) == ["fair", "50.0"] for line in below)


def test_a_broken_model_has_a_figure() -> None:
    huge = Perplexity(2.5e9, 21.6, 7, 441, 64)
    original = Run(ORIGINAL.size, {"a": scored(2.0)})
    shown = lines([ComparedRow("rtn", (Run(QUANTIZED, {"a": huge}, 0),), original)])
    assert "2.5e+09" in shown[-1]


def test_csv() -> None:
    read = list(csv.DictReader(io.StringIO(csv_text(ROWS))))
    assert [line["recipe"] for line in read] == ["FP16", "mxrot", "rtn"]
    assert float(read[1]["ratio"]) == ROW.ratio().value and float(read[1]["ratio_error"]) == ROW.ratio().error
    assert float(read[1]["perplexity a"]) == ROW.mean_perplexity("a").value and read[1]["seeds"] == "0 1"
    assert float(read[1]["kl_of_text b"]) == pytest.approx(0.4)
    assert read[2]["reason"] == "model.layers.3: the reason" and read[2]["ratio"] == ""
