"""The share of a model's task accuracy that quantization leaves, by examples that both models have answered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mxrot.evaluation.tasks import TaskScore, standard_error


@dataclass(frozen=True)
class Recovery:
    """The mean over tasks of the share of right answers, absolute and relative to the original model. From 0 to 1."""

    mean: float
    error: float
    """The standard error of the mean over examples."""
    relative: float
    """The mean divided by that of the original."""
    relative_error: float
    """Its standard error, from paired examples: both models have answered the same ones."""


def recovery(scores: Mapping[str, TaskScore], original: Mapping[str, TaskScore], normed: bool) -> Recovery:
    """The recovery of `acc`, or with `normed` of `acc_norm` if a task has it. Every task counts the same.

    The error of the ratio r is that of the mean of q - r f over the examples' hits q and f, to first order. Hits can be
    means over seeds. An error is NaN if a task has one example. Ratios are NaN if the original has no hits.
    """
    pairs = [_hits(scores[name], original[name], normed) for name in original]
    found, expected = ([sum(pair[index]) / len(pair[index]) for pair in pairs] for index in (0, 1))
    mean, reference = sum(found) / len(found), sum(expected) / len(expected)
    relative = mean / reference if reference else math.nan
    apart = [[a - relative * b for a, b in zip(*pair, strict=True)] for pair in pairs]
    return Recovery(
        mean=mean,
        error=_error_of_mean([pair[0] for pair in pairs]),
        relative=relative,
        relative_error=_error_of_mean(apart) / reference if reference else math.nan,
    )


def _hits(score: TaskScore, original: TaskScore, normed: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    metric = original.best if normed else "acc"
    return score.hits[metric], original.hits[metric]


def _error_of_mean(samples: list[tuple[float, ...]] | list[list[float]]) -> float:
    """The standard error of the mean over tasks of the means over examples."""
    errors = [standard_error(values) for values in samples]
    return math.sqrt(sum(math.nan if error is None else error**2 for error in errors)) / len(errors)
