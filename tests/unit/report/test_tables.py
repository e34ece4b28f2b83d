"""Tables hold the numbers they are given, and nothing wraps."""

from __future__ import annotations

import io
import math

from rich.console import Console, RenderableType

from mxrot.evaluation import Perplexity, SiteMaxima, TaskScore
from mxrot.layers import ModelSize
from mxrot.report import (
    ComparedRow,
    Run,
    compared_tasks_table,
    comparison_table,
    errors_table,
    experts_line,
    maxima_table,
    perplexity_table,
    recovery_table,
    rotation_line,
    size_line,
    tasks_table,
    tuning_line,
)

PLAIN = ModelSize(other_bytes=269_000_000)
QUANTIZED = ModelSize(1_000_000, code_bytes=500_000, scale_bytes=31_250, transform_bytes=4_000, other_bytes=2_000_000)


def scored(nll: float) -> Perplexity:
    return Perplexity(math.exp(nll), nll, windows=7, tokens=7 * 63, seq_len=64)


def lines(table: RenderableType) -> list[list[str]]:
    """The cells of each row of a rendered table."""
    console = Console(width=140, file=io.StringIO(), color_system=None)
    console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    return [
        [cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line.startswith("│")
    ]


def test_comparison() -> None:
    rows = [
        ComparedRow("original", (Run(PLAIN, {"a": scored(2.0), "b": scored(3.0)}),)),
        ComparedRow("duquant++", (Run(QUANTIZED, {"a": scored(2.5), "b": scored(3.5)}, seconds=12.34),)),
        ComparedRow("mxrot", reason="it cannot be taken"),
    ]
    assert lines(comparison_table(rows, "title")) == [
        ["original", "7.39", "20.09", "16", "", "269.0", ""],
        ["duquant++", "12.18", "33.12", "4.25", "+0.032", "2.5", "12.3"],
        ["mxrot", "-", "-", "", "", "", ""],
    ]


SCORES = {
    "arc_easy": TaskScore({"acc": (0.0, 0.0), "acc_norm": (1.0, 0.0)}, "validation", ""),
    "lambada_openai": TaskScore({"acc": (1.0,)}, "test", ""),
}


def test_tasks() -> None:
    assert lines(tasks_table("model", SCORES)) == [
        ["arc_easy", "0.00 % +- 0.00", "50.00 % +- 50.00", "2", "validation"],
        ["lambada_openai", "100.00 %", "", "1", "test"],
    ]


def test_compared_tasks() -> None:
    """Two seeds of the second, one of them without the hit that counts in acc."""
    worse = {"arc_easy": SCORES["arc_easy"], "lambada_openai": TaskScore({"acc": (0.0,)}, "test", "")}
    perplexity = {"words": scored(2.0)}
    original = Run(PLAIN, perplexity, tasks=SCORES)
    rows = [
        ComparedRow("original", (original,)),
        ComparedRow("rtn", tuple(Run(PLAIN, perplexity, tasks=scores) for scores in (SCORES, worse)), original),
    ]
    assert lines(compared_tasks_table(rows)) == [
        ["original", "50.00 +- 50.00", "100.00", "75.00"],
        ["rtn", "50.00 +- 50.00", "50.00", "50.00"],
    ]
    assert lines(recovery_table(rows)) == [
        ["original", "75.00", "", "50.00", ""],
        ["rtn", "50.00", "66.7", "25.00", "50.0"],
    ]
    table = rows[1].as_table()
    assert list(table["tasks"]) == list(SCORES)
    expected = {"acc": 0.25, "acc_recovered": 0.5, "first": 0.5, "first_recovered": 2 / 3}
    assert {key: value for key, value in table["tasks_mean"].items() if value is not None} == expected


def test_perplexity() -> None:
    assert lines(perplexity_table("model", {"words": scored(2.0)})) == [["words", "7.389", "2.0000", "7 x 64", "441"]]


def test_maxima() -> None:
    site = SiteMaxima("model.layers.11.mlp.down_proj", 1536, largest=3074.0, channel=1229, median=1.131)
    assert lines(maxima_table([site])) == [[site.site, "1536", "3074", "1229", "1.131", "2717.9"]]


def test_errors_with_and_without_data() -> None:
    linear = {"name": "model.layers.0.mlp.down_proj", "shape": [576, 1536], "weight_error": 0.11}
    blocks = [
        {"linears": [linear | {"output_error": 0.125, "damping": 0.01}]},
        {"linears": [linear | {"output_error": None, "damping": None}]},
    ]
    assert lines(errors_table(blocks)) == [
        [linear["name"], "576 x 1536", "0.1100", "0.1250", "0.01"],
        [linear["name"], "576 x 1536", "0.1100", "", ""],
    ]
    assert lines(errors_table(blocks[1:])) == [[linear["name"], "576 x 1536", "0.1100"]]  # no empty columns


def test_size_line() -> None:
    said = size_line({**vars(QUANTIZED), "bits_per_weight": QUANTIZED.bits_per_weight})
    assert said == ("codes and scales 0.5 MB (4.250 bits a weight), transforms 0.00 MB, everything else 2.0 MB")


def test_rotation_line() -> None:
    assert rotation_line({}) == rotation_line({"rotation_losses": None}) == ""
    found = rotation_line({"rotation_losses": [4.0, 3.0, *[2.9] * 16, 2.5, 2.0]})
    assert "20 steps" in found and "3.5000 at first and 2.2500 at last (means of 2)" in found
    assert "4.0000 at first and 4.0000 at last (means of 1)" in rotation_line({"rotation_losses": [4.0]})


def test_tuning_line() -> None:
    def look(*losses: float) -> list[dict[str, object]]:
        return [{"step": 10 * i, "train": None, "held_out": loss} for i, loss in enumerate(losses)]

    assert tuning_line({"blocks": [{"tuning": None}], "tuning": None}) == ""
    network = tuning_line({"blocks": [], "tuning": look(0.5, 0.25, 0.3)})
    assert network == "tuned in 20 steps: held-out loss 0.5 to 0.25 (divergence of the logits, nats a token)"
    blocks = tuning_line({"blocks": [{"tuning": look(0.4, 0.1)}, {"tuning": look(0.2, 0.3)}], "tuning": None})
    assert blocks == "tuned in 20 steps: held-out loss 0.3 to 0.15 (relative squared error, mean over blocks)"


def test_experts_with_few_tokens_are_named() -> None:
    few = {f"model.layers.1.mlp.experts.{number}": number for number in range(5)}
    assert experts_line({"blocks": [{"few_tokens": {}}, {}]}) == ""
    assert experts_line({"blocks": [{"few_tokens": {"a.experts.3": 7}}]}) == (
        "calibrated on all tokens of the block, because too few were sent to them: a.experts.3 (7)"
    )
    line = experts_line({"blocks": [{}, {"few_tokens": few}]})
    assert line.endswith("mlp.experts.2 (2) and 2 more, named in run.json")


def test_of_experts_the_largest_error_is_shown() -> None:
    """By the error of the output, or of the weights where that was not measured."""
    linears = [
        {"name": f"layers.0.experts.{number}.{name}", "shape": [2, 2], "damping": None}
        | {"weight_error": weight, "output_error": output}
        for name, number, weight, output in (
            ("w1", 0, 0.1, 0.3),
            ("w1", 11, 0.2, 0.2),
            ("w2", 0, 0.1, None),
            ("w2", 11, 0.2, None),
        )
    ]
    shown = [row[0] for row in lines(errors_table([{"linears": linears}, {"linears": linears[:1]}]))]
    assert shown == ["layers.0.experts.0.w1", "layers.0.experts.11.w2", "layers.0.experts.0.w1"]
