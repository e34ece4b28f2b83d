"""Rows of a comparison: means, errors, ratios, order, and JSON there and back."""

from __future__ import annotations

import json
import math

import pytest

from mxrot.evaluation import Divergence, Perplexity, TaskScore
from mxrot.layers import ModelSize
from mxrot.report import ComparedRow, Run
from mxrot.report.rows import in_order, mean_of

PLAIN = ModelSize(other_bytes=269_000_000)
QUANTIZED = ModelSize(1_000_000, code_bytes=500_000, scale_bytes=31_250, transform_bytes=4_000, other_bytes=2_000_000)


def scored(nll: float) -> Perplexity:
    return Perplexity(math.exp(nll), nll, windows=7, tokens=7 * 63, seq_len=64)


def apart(kl: float) -> Divergence:
    return Divergence(kl, math.nan, 0.5, math.nan, 12.0, 10.0, 2.0, math.nan, 1, 63)


def run(a: float, b: float, kl: float, seed: int = 0, **more: object) -> Run:
    texts = {"a": scored(a), "b": scored(b)}
    return Run(QUANTIZED, texts, seed, divergence={"a": apart(kl), "b": apart(2 * kl)}, **more)  # type: ignore[arg-type]


ORIGINAL = Run(PLAIN, {"a": scored(2.0), "b": scored(3.0)})
ROW = ComparedRow(
    "mxrot",
    (run(2.1, 3.3, 0.1, seconds=2.0, peak_bytes=5), run(2.3, 3.1, 0.3, 1, seconds=4.0, peak_bytes=7)),
    ORIGINAL,
    recipe_toml="name = ...",
)


def test_means_have_the_standard_error_of_the_mean() -> None:
    assert mean_of([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3)))
    assert mean_of([5.0]) == (5.0, None)


def test_ratios_are_geometric_means_over_texts_and_then_means_over_seeds() -> None:
    each = [math.exp((0.1 + 0.3) / 2), math.exp((0.3 + 0.1) / 2)]
    assert ROW.ratio().value == pytest.approx(sum(each) / 2) and ROW.ratio().error == pytest.approx(0, abs=1e-12)
    assert ROW.ratio("a").value == pytest.approx((math.exp(0.1) + math.exp(0.3)) / 2)
    assert ROW.mean_perplexity("b").value == pytest.approx((math.exp(3.3) + math.exp(3.1)) / 2)
    assert ROW.kl() == (pytest.approx((0.15 + 0.45) / 2), pytest.approx(0.15))
    assert ROW.kl("b") == (pytest.approx(0.4), pytest.approx(0.2))
    assert ComparedRow("FP16", (ORIGINAL,)).ratio() == (1.0, None) and ComparedRow("FP16", (ORIGINAL,)).kl() is None
    assert (ROW.quantize_seconds, ROW.peak_bytes) == (3.0, 7)


def test_the_original_comes_first_then_the_best_and_last_what_has_no_figures() -> None:
    rows = [
        ComparedRow("none", reason="cannot be taken"),
        ComparedRow("worse", (run(2.5, 3.5, 1.0),), ORIGINAL),
        ComparedRow("broken", (run(2.0, 3.0, 0.0),), ORIGINAL, "seed 1: NaN"),
        ComparedRow("better", (run(2.4, 3.5, 2.0),), ORIGINAL),
        ComparedRow("FP16", (ORIGINAL,)),
    ]
    assert [row.recipe for row in in_order(rows)] == ["FP16", "better", "worse", "none", "broken"]


def test_a_row_as_json_is_json() -> None:
    table = ROW.as_table()
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert {key: table[key] for key in ("recipe", "bits_per_weight", "transform_bits_per_weight", "megabytes")} == {
        "recipe": "mxrot",
        "bits_per_weight": 4.25,
        "transform_bits_per_weight": 0.032,
        "megabytes": 2.53525,
    }
    assert table["seconds"] == 3.0 and table["peak_bytes"] == 7 and table["seeds"] == [0, 1]
    assert table["kl_of_text"] == {"a": pytest.approx(0.2), "b": pytest.approx(0.4)}
    assert [one["divergence"]["a"]["kl"] for one in table["runs"]] == [0.1, 0.3]
    assert table["runs"][0]["divergence"]["a"]["kl_error"] is None
    assert table["recipe_toml"] == "name = ..." and "tasks" not in table
    plain = ComparedRow("FP16", (ORIGINAL,)).as_table()
    assert (plain["bits_per_weight"], plain["ratio"], plain["kl"], plain["seeds"]) == (16.0, 1.0, None, [])
    said = ComparedRow("none", reason="cannot be taken").as_table()
    assert said["reason"] == "cannot be taken" and said["runs"] == []
    extra = ComparedRow("rtn", (Run(QUANTIZED, {"a": scored(2.0)}, extra={"generated": "text"}),))
    assert extra.as_table()["generated"] == "text"


def test_a_run_comes_back_from_json_as_it_was() -> None:
    score = TaskScore({"acc": (0.0, 1.0)}, "test", "digest")
    kept = run(2.1, 3.3, 0.1, tasks={"piqa": score}, extra={"generated": "x"}, seconds=0.1, peak_bytes=3)
    back = Run.from_json(json.loads(json.dumps(kept.to_json())))
    assert repr(back) == repr(kept) and back.measures_as(kept)
    assert not back.measures_as(run(2.1, 3.3, 0.11)) and not back.measures_as(run(2.1, 3.4, 0.1))


def test_answers_are_means_over_seeds() -> None:
    runs = tuple(
        Run(QUANTIZED, {}, seed, tasks={"piqa": TaskScore({"acc": hits}, "test", "d")})
        for seed, hits in enumerate([(0.0, 1.0), (1.0, 1.0)])
    )
    assert ComparedRow("mxrot", runs).tasks == {"piqa": TaskScore({"acc": (0.5, 1.0)}, "test", "d")}
