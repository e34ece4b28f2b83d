"""`mxrot eval`, `report` and `compare` as several processes: the figures of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.ranked import made_by, read_outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by("tests.unit.ranked_evaluation", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    return read_outcomes(folder)


@pytest.mark.slow
def test_several_give_the_figures_of_one(folder: Path, outcomes: dict[str, Any]) -> None:
    """One test, so that workers that share the tests do not each start all processes."""
    for size in (2, 3):
        look_at_perplexity_and_divergence(folder, outcomes, size)
    look_at_tasks(folder, outcomes)
    look_at_a_comparison(folder, outcomes)
    pytest.importorskip("matplotlib")
    look_at_a_report(folder, outcomes)


def look_at_perplexity_and_divergence(folder: Path, outcomes: dict[str, Any], size: int) -> None:
    """To the last bit; of three processes one has nothing to do with three batches of five windows, or each has one."""
    assert [one["code"] for one in outcomes[f"apart {size}"]] == [0] * size, outcomes[f"apart {size}"]
    tables = [json.loads((folder / f"apart-{count}.json").read_text()) for count in (1, size)]
    assert tables[0]["perplexity"] == tables[1]["perplexity"]
    assert tables[0]["divergence"] == tables[1]["divergence"]
    assert [table["processes"] for table in tables] == [1, size]
    assert all("perplexity" not in one["text"].lower() for one in outcomes[f"apart {size}"][1:])


def look_at_tasks(folder: Path, outcomes: dict[str, Any]) -> None:
    """Requests are shared, and gone on with after an interrupt."""
    for name in ("asked 2", "asked again"):
        assert [one["code"] for one in outcomes[name]] == [0, 0], outcomes[name]
    one, two = (json.loads((folder / f"asked-{count}.json").read_text())["tasks"] for count in (1, 2))
    assert one == two
    shared, again = ((folder / f"asked-{name}.json.kept").read_text().splitlines() for name in (1, 2))
    assert len(again) == len(shared)


def look_at_a_comparison(folder: Path, outcomes: dict[str, Any]) -> None:
    """Every figure is that of one process, but for times; all are kept, and taken by any number of processes."""

    def figures(name: str) -> Any:
        table = json.loads((folder / f"{name}.json").read_text())
        skipped = ("seconds", "peak_bytes", "runs")
        return [{key: value for key, value in row.items() if key not in skipped} for row in table["rows"]]

    for name, size in (("compared 1", 1), ("compared 2", 2), ("compared 2 again", 2), ("compared 3 again", 3)):
        assert [one["code"] for one in outcomes[name]] == [0] * size, outcomes[name]
        assert figures(name) == figures("compared 1"), name
        assert len(figures(name)) == 5 and sum(row["reason"] is None for row in figures(name)) == 4
        again = "runs were finished before" in outcomes[name][0]["text"]
        assert again == name.endswith("again")
        assert not any(one["text"].strip() for one in outcomes[name][1:])
    assert not (folder / "work-two" / "original").exists()


def look_at_a_report(folder: Path, outcomes: dict[str, Any]) -> None:
    """The page of one process, from the first; the others measure, and say nothing."""
    for size in (1, 2):
        assert [one["code"] for one in outcomes[f"reported {size}"]] == [0] * size, outcomes[f"reported {size}"]
    one, two = ((folder / f"report-{size}.html").read_text() for size in (1, 2))
    assert one == two and "KL" in one
    assert not outcomes["reported 2"][1]["text"]
