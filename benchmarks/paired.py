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


def apart(over: Values, under: Values) -> list[float]:
    """Of each window how far it moves the logarithm of `ratio`, to first order: a_i / a - b_i / b, of mean 0."""
    a, b = sum(over) / len(over), sum(under) / len(under)
    return [x / a - y / b for x, y in zip(over, under, strict=True)]


def geometric_mean(values: Values) -> float:
    """Of at least one value; NaN if one is not positive."""
    if any(not value > 0 for value in values):
        return math.nan
    return math.exp(sum(math.log(value) for value in values) / len(values))


def error_of_geometric_mean(value: float, groups: Sequence[Sequence[Values]]) -> float | None:
    """The standard error of a geometric mean of ratios, from what `apart` gives of each.

    Ratios of a group are of the same windows, as those after several calibrations are, and are no news of each other;
    groups, of other models and texts, are taken to be independent.
    """
    sums = [[sum(windows) for windows in zip(*group, strict=True)] for group in groups]
    errors = [standard_error(each) for each in sums]
    count = sum(len(group) for group in groups)
    return None if None in errors else value * math.sqrt(sum(error**2 for error in errors if error)) / count
