"""Ratios of two models that were measured on the same windows, with standard errors.

Windows of a text differ far more than two recipes do on one of them, so an error of a difference is taken from each
window's own difference. A ratio of means r = a / b moves, to first order, by the mean over windows of
(a_i - r b_i) / b (Cochran, Sampling Techniques, section 6.4), whose standard error is given. It is that over windows of
the same text; what seeds do is told apart from it, because a few seeds say little about their own spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mxrot.evaluation import standard_error

Values = Sequence[float]
"""One for each window."""


class Figure(NamedTuple):
    """With its standard error; None where there is nothing to take it from."""

    value: float
    error: float | None


def mean(values: Values) -> Figure:
    """Of at least one value."""
    return Figure(sum(values) / len(values), standard_error(values))


def ratio(over: Values, under: Values) -> Figure:
    """Of the means of two measures of the same windows, paired; NaN where the one below is not positive."""
    if len(over) != len(under):
        raise ValueError(f"{len(over)} and {len(under)} windows are not pairs")
    below = sum(under) / len(under)
    if not below > 0:
        return Figure(math.nan, None)
    value = sum(over) / len(over) / below
    return Figure(value, standard_error([(a - value * b) / below for a, b in zip(over, under, strict=True)]))


def exp_of_mean_difference(over: Values, under: Values) -> Figure:
    """exp(mean(over) - mean(under)), paired: the ratio of two perplexities from negative log-likelihoods."""
    found = mean([a - b for a, b in zip(over, under, strict=True)])
    value = math.exp(found.value)
    return Figure(value, None if found.error is None else value * found.error)


def mean_over_seeds(seeds: Sequence[Values]) -> list[float]:
    """Of each window the mean over seeds."""
    return [sum(values) / len(values) for values in zip(*seeds, strict=True)]


def geometric_mean(figures: Sequence[Figure]) -> Figure:
    """Of positive figures that do not depend on each other, as those of different models and texts."""
    if not figures or any(not figure.value > 0 for figure in figures):
        return Figure(math.nan, None)
    value = math.exp(sum(math.log(figure.value) for figure in figures) / len(figures))
    errors = [None if figure.error is None else figure.error / figure.value for figure in figures]
    known = [error for error in errors if error is not None]
    whole = value * math.sqrt(sum(error**2 for error in known)) / len(figures) if len(known) == len(figures) else None
    return Figure(value, whole)
