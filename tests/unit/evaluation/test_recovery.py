"""What is left of the accuracy in tasks, by hand."""

from __future__ import annotations

import math

import pytest

from mxrot.evaluation import TaskScore, recovery, standard_error


def score(acc: str, acc_norm: str | None = None) -> TaskScore:
    """From strings of hits, as in "0110"."""
    metrics = {"acc": acc} | ({} if acc_norm is None else {"acc_norm": acc_norm})
    return TaskScore({name: tuple(float(hit) for hit in hits) for name, hits in metrics.items()}, "test", "digest")


def test_it_is_of_the_mean_over_tasks_and_its_error_of_paired_examples() -> None:
    original = {"a": score("1100", "1110"), "b": score("10")}
    same = recovery(original, original, normed=False)
    assert (same.mean, same.relative, same.relative_error) == (0.5, 1.0, 0.0)
    worse = {"a": score("0100", "1110"), "b": score("10")}
    found = recovery(worse, original, normed=False)
    assert found.mean == (0.25 + 0.5) / 2 and found.relative == 0.75
    # q - r f: of a -0.75, 0.25, 0, 0 and of b 0.25, 0; half the root of the sum of squares, over the mean of f.
    errors = [standard_error((-0.75, 0.25, 0.0, 0.0)), standard_error((0.25, 0.0))]
    assert found.relative_error == pytest.approx(math.hypot(*errors) / 2 / 0.5, rel=1e-12)
    assert recovery(worse, original, normed=True).relative == 1.0
    assert recovery({"a": score("0000")}, {"a": score("1010")}, normed=False).error == 0.0


def test_it_is_not_a_number_where_nothing_was_right_or_there_is_one_example() -> None:
    nothing = {"a": score("0000")}
    found = recovery({"a": score("0110")}, nothing, normed=False)
    assert found.mean == 0.5 and math.isnan(found.relative) and math.isnan(found.relative_error)
    one = recovery({"a": score("1")}, {"a": score("1")}, normed=False)
    assert one.relative == 1.0 and math.isnan(one.relative_error) and math.isnan(one.error)
