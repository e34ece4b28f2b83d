"""Figures from what `mxrot eval --json` writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mxrot.checkpoint.metric import Metric
from mxrot.errors import ConfigError, DataError
from mxrot.report import metrics_of, read_results

SCORE = {"ppl": 8.0, "nll": math.log(8.0), "windows": 4, "tokens": 2044, "seq_len": 512}
APART = {
    **{"kl": 0.5, "kl_error": 0.01, "agreement": 0.75, "agreement_error": 0.02},
    **{"ppl": 8.0, "original_ppl": 6.0, "ppl_difference": 2.0, "ppl_error": 0.25, "windows": 4, "tokens": 2044},
}
COUNTED = "4 x 512 tokens"


def test_perplexity_by_itself() -> None:
    assert metrics_of({"perplexity": {"a": SCORE}, "divergence": None, "tasks": {}}, None) == [
        Metric("a", "perplexity", 8.0, counted=COUNTED)
    ]


def test_perplexity_beside_a_baseline_that_saw_the_same() -> None:
    original = {"perplexity": {"a": {**SCORE, "ppl": 6.0}}}
    (found,) = metrics_of({"perplexity": {"a": SCORE}}, original)
    assert found == Metric("a", "perplexity", 8.0, None, 6.0, None, COUNTED)
    assert found.cells == ("a", "perplexity", "6.000", "8.000", "+2.000", COUNTED)
    original["perplexity"]["a"]["windows"] = 8
    with pytest.raises(ConfigError, match="a: measured on 4 windows here and on 8 for the original"):
        metrics_of({"perplexity": {"a": SCORE}}, original)


def test_divergence_gives_the_original_and_an_error() -> None:
    found = metrics_of({"perplexity": {"a": SCORE}, "divergence": {"a": APART}}, None)
    assert [metric.cells[2:5] for metric in found] == [
        ("6.000", "8.000", "+2.000 ± 0.250"),
        ("", "0.5000 ± 0.0100", ""),
        ("", "75.00 ± 2.00", ""),
    ]
    alone: dict[str, Any] = {**APART, "kl_error": math.nan, "ppl_error": math.nan}
    found = metrics_of({"perplexity": {"a": SCORE}, "divergence": {"a": alone}}, None)
    assert found[0].cells[4] == "+2.000" and found[1].cells[3] == "0.5000"


def test_tasks() -> None:
    tasks = {
        "arc": {"acc": 0.5, "acc_norm": 0.25, "stderr": 0.01, "acc_norm_stderr": 0.03, "n": 200, "sha256": "e1"},
        "own": {"acc": 0.5, "stderr": 0.02, "acc_norm": None, "acc_norm_stderr": None, "n": 10, "sha256": "e2"},
    }
    original = {"tasks": {"arc": {"acc": 0.625, "acc_norm": 0.375, "n": 200, "sha256": "e1"}}}
    found = metrics_of({"tasks": tasks}, original)
    assert [metric.cells for metric in found] == [
        ("arc", "acc, %", "62.50", "50.00 ± 1.00", "-12.50", "200 questions"),
        ("arc", "acc_norm, %", "37.50", "25.00 ± 3.00", "-12.50", "200 questions"),
        ("own", "acc, %", "", "50.00 ± 2.00", "", "10 questions"),
    ]
    original["tasks"]["arc"]["sha256"] = "other"
    with pytest.raises(ConfigError, match="arc: measured on e1 sha256 here and on other for the original"):
        metrics_of({"tasks": tasks}, original)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not what `mxrot eval --json` writes: no perplexity and no tasks"),
        ('{"rows": []}', "no perplexity and no tasks"),
        ('{"perplexity": {"a": {"ppl": 1}}}', "KeyError 'windows'"),
        ('{"perplexity": [1]}', "AttributeError"),
        ('{"tasks": {"a": {"acc": "high"}}}', "ValueError"),
    ],
)
def test_a_file_that_is_not_one(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_results(path)


def test_reading_a_file(tmp_path: Path) -> None:
    table = {"model": "m", "perplexity": {"a": SCORE}, "tasks": {}}
    (tmp_path / "results.json").write_text(json.dumps(table))
    assert read_results(tmp_path / "results.json") == table
    with pytest.raises(DataError, match=r"nothing\.json: cannot be read"):
        read_results(tmp_path / "nothing.json")
