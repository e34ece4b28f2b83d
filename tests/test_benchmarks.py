"""The tables of benchmarks/ are recipes that exist, and their rows add up."""

from __future__ import annotations

import json
import math
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def accuracy() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        import accuracy
    finally:
        sys.path.remove(str(FOLDER))
    return accuracy


def test_tables_in_the_documentation_are_those_of_the_results() -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        import markdown
    finally:
        sys.path.remove(str(FOLDER))
    found = 0
    for page in (FOLDER.parent / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for names, table in re.findall(r"<!-- table: (.*?) -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL):
            results = [json.loads((FOLDER / "results" / name).read_text(encoding="utf-8")) for name in names.split()]
            assert markdown.table(results) == table, page.name
            found += 1
    assert found


def test_every_row_is_a_recipe_and_has_a_name_of_its_own(accuracy: Any) -> None:
    from mxrot.recipe import load_recipe

    for table, runs in accuracy.TABLES.items():
        assert len({run.label for run in runs}) == len(runs), table
        for run in runs:
            assert run.seeds and (run.recipe is None or load_recipe(run.recipe).changed(run.changes))


def entry(label: str, seed: int, *values: float) -> dict[str, Any]:
    texts = dict(zip(("one", "two"), values, strict=True))
    return {
        "label": label,
        "seed": seed,
        "quantize_seconds": 1.0,
        "peak_gpu_bytes": 2e9,
        "perplexity": {name: {"ppl": value} for name, value in texts.items()},
    }


def options(**changes: Any) -> Namespace:
    asked = {"table": "tuned", "only": "", "model": "demo", "out": None, "device": "cpu"}
    whole = {"claims": None, "known": [], "seeds": None, "stop_after": math.inf}
    return Namespace(**(asked | whole | changes))


def test_rows_are_means_over_seeds_relative_to_the_unquantized_model(accuracy: Any) -> None:
    label = "mxrot-tuned"
    entries = [entry(label, 2, 26.0, 12.0), entry("FP16", 0, 20.0, 10.0), entry(label, 0, 22.0, 12.5)]
    original, tuned = accuracy.summaries(options(), entries)
    assert original["relative"] == {"one": 1.0, "two": 1.0}
    assert tuned["means"] == {"one": 24.0, "two": 12.25} and tuned["spread"] == 4.0
    assert tuned["relative"] == {"one": 1.2, "two": 1.225}
    assert [found["seed"] for found in tuned["seeds"]] == [0, 2]
    assert not tuned["holds"]  # 24.0 is, 1.225 is not
    assert "MISSED" in accuracy.line(tuned) and "24.000" in accuracy.line(tuned)
    entries[0]["perplexity"]["two"]["ppl"] = 11.0
    assert accuracy.summaries(options(), entries)[1]["holds"]


def test_an_error_is_a_result(accuracy: Any) -> None:
    failed = {"label": "mxrot-tuned", "seed": 0, "error": "NumericsError: layer 3"}
    row = accuracy.summaries(options(), [failed])[0]
    assert "FAILED: NumericsError: layer 3" in accuracy.line(row)


@pytest.fixture
def quick(accuracy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark with measurements that take no time; `taken` is what was measured."""
    taken: list[tuple[str, int]] = []

    class Bench:
        @staticmethod
        def prepare(options: Namespace, device: str) -> Bench:
            return Bench()

        def description(self) -> dict[str, Any]:
            return {"device": "cpu"} | dict.fromkeys(accuracy.SAME, "same")

    def measure(run: Any, seed: int, bench: Bench) -> dict[str, Any]:
        taken.append((run.label, seed))
        value = float(len(run.label) + seed)
        return {"perplexity": {"one": {"ppl": value}, "two": {"ppl": value}}}

    monkeypatch.setattr(accuracy, "Bench", Bench)
    monkeypatch.setattr(accuracy, "measure", measure)
    return Namespace(taken=taken, **{name: getattr(accuracy, name) for name in ("measure_units", "known_entries")})


def units(accuracy: Any) -> list[tuple[str, int]]:
    return sorted((run.label, seed) for run in accuracy.TABLES["base"] for seed in run.seeds)


def test_processes_that_share_claims_measure_everything_once(accuracy: Any, quick: Any, tmp_path: Path) -> None:
    """Two that stop at different seeds and one that takes the rest; together the rows are those of one process."""
    out = tmp_path / "parts"
    for seeds in ([2], [0], None):
        quick.measure_units(options(table="base", out=out / str(seeds), claims=tmp_path / "claims", seeds=seeds))
    assert sorted(quick.taken) == units(accuracy)
    found = quick.known_entries(sorted(out.glob("*/*.json")), dict.fromkeys(accuracy.SAME, "same"))
    rows = accuracy.summaries(options(table="base"), found)
    assert [row["label"] for row in rows] == [run.label for run in accuracy.TABLES["base"]]
    assert [len(row["seeds"]) for row in rows] == [len(run.seeds) for run in accuracy.TABLES["base"]]


def test_what_is_known_is_not_measured_again(accuracy: Any, quick: Any, tmp_path: Path) -> None:
    quick.measure_units(options(table="base", out=tmp_path / "first", only="rtn|duquant"))
    first = list(quick.taken)
    (known,) = (tmp_path / "first").glob("*.json")
    quick.measure_units(options(table="base", out=tmp_path / "all", known=[known]))
    assert 0 < len(first) < len(quick.taken) and sorted(quick.taken) == units(accuracy)
    (written,) = (tmp_path / "all").glob("*.json")
    assert [row["label"] for row in json.loads(written.read_text())["rows"]] == [
        run.label for run in accuracy.TABLES["base"]
    ]


def test_results_of_another_commit_are_not_known(accuracy: Any, quick: Any, tmp_path: Path) -> None:
    quick.measure_units(options(table="base", out=tmp_path, only="rtn"))
    (known,) = tmp_path.glob("*.json")
    with pytest.raises(SystemExit, match="does not belong into this table: commit differ"):
        quick.known_entries([known], dict.fromkeys(accuracy.SAME, "same") | {"commit": "other"})


def test_nothing_is_begun_after_the_time(quick: Any, tmp_path: Path) -> None:
    quick.measure_units(options(table="base", out=tmp_path, stop_after=-1.0))
    assert not quick.taken


def test_only_takes_several_parts_of_labels(accuracy: Any) -> None:
    labels = [run.label for run in accuracy.chosen_runs(options(table="base", only="rtn|released"))]
    assert labels == ["rtn, even", "rtn, floor", "duquant++-released", "duquant++-released-gptq"]


def test_a_checkpoint_that_reloads_as_another_model_is_seen(accuracy: Any) -> None:
    for found, reloads in ((24.00001, True), (24.001, False)):
        again = entry("mxrot-tuned", 0, 24.0, 12.0) | {"reloaded": {"one": found, "two": 12.0}}
        (row,) = accuracy.summaries(options(), [again])
        assert row["reloads"] is reloads
        assert ("reloads as it was" in accuracy.line(row)) is reloads
