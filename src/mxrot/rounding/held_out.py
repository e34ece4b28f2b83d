"""Choose the damping of a regression, or of GPTQ, by the error on tokens held out from the fit.

Let a site have weights W and inputs x, and let d be what its outputs lack of the target. Weights Q then have the error
|(Q - W) x - d|^2 per token. On held-out tokens this depends only on their moments, H = E[x^T x] and C = E[d^T x], up to
a constant: tr((Q - W) H (Q - W)^T) - 2 tr((Q - W) C^T). Errors are relative to tr(W H W^T), the energy of the outputs,
so folds can be added up.

Two dampings are chosen in turn, because rounding adds nearly the same error whatever the regression is. The damping of
the regression is measured on its unrounded weights, M = C (H + c I)^-1; infinity means M = 0, the target "own". The
damping of GPTQ is measured by really rounding a sample of rows: scales grow with the errors passed on, and no formula
for a column's error covers that.

A `Fold` names the tokens to fit to and the tokens to measure on. They may be two kinds of text, so that a habit of one
kind costs on the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Spread = Callable[[Sequence[Callable[[], float]]], list[float]]
"""Runs tasks, possibly in several processes, and returns their results; see `World.spread`."""
SAMPLED_ROWS = 128
"""The number of rows rounded to choose a damping, evenly spaced among those of a site."""


@dataclass(frozen=True)
class Moments:
    """The moments of a site over some tokens."""

    hessian: Tensor
    """The mean of x^T x, float64 [K, K]."""
    shift: Tensor | None
    """The mean of d^T x, float64 [N, K]; None for the target "own"."""
    tokens: int

    @staticmethod
    def together(parts: Sequence[Moments]) -> Moments:
        """The moments over the tokens of all parts, in the tensors of the first part, which is overwritten."""
        tokens = sum(part.tokens for part in parts)
        (first, *others) = parts
        for total in (first.hessian, first.shift):
            if total is not None:
                total.mul_(first.tokens / tokens).add_(0.0)  # turns -0 into +0, as adding a matrix would
        for part in others:
            first.hessian.add_(part.hessian, alpha=part.tokens / tokens)
            if first.shift is not None and part.shift is not None:
                first.shift.add_(part.shift, alpha=part.tokens / tokens)
        return Moments(first.hessian, first.shift, tokens)


@dataclass(frozen=True)
class Fold:
    """The tokens to fit to, and the tokens to measure on."""

    fitted: Moments
    unseen: Moments


def left_on(move: Tensor, seen: Moments) -> float:
    """The error of weights changed by `move` [n, K] on these tokens, minus that of unchanged weights.

    It is the mean over tokens of |move x - d|^2 - |d|^2, summed over n rows.
    """
    found = (move @ seen.hessian).mul_(move).sum()
    if seen.shift is not None:
        found = found - 2 * (move * seen.shift).sum()
    return float(found)


def choose_target_damping(
    folds: Sequence[Fold],
    energies: Sequence[float],
    candidates: Sequence[float],
    factor_of: Callable[[float, Tensor], Tensor],
    spread: Spread | None = None,
) -> float:
    """The candidate whose regression has the least error on unseen tokens, with folds relative to their `energies`.

    In a tie the largest is taken. Infinity means no regression. `factor_of(damping, H)` gives U with U^T U the inverse
    of the damped H, as `inverse_factor` does. `spread` runs it for each fold and candidate.
    """

    def left(damping: float, fold: Fold, energy: float) -> float:
        assert fold.fitted.shift is not None
        factor = factor_of(damping, fold.fitted.hessian)
        move = (fold.fitted.shift @ factor.t()) @ factor
        del factor  # as large as a Hessian, and the next factor takes two
        return left_on(move, fold.unseen) / energy

    ordered = sorted(candidates, reverse=True)
    tried = [damping for damping in ordered if not math.isinf(damping)]
    found = dict(zip(tried, _of_all_folds(left, tried, folds, energies, spread or _in_turn), strict=True))
    return min(ordered, key=lambda damping: found.get(damping, 0.0))


def choose_damping(
    folds: Sequence[Fold],
    energies: Sequence[float],
    candidates: Sequence[float],
    errors_of: Callable[[float, Tensor], Tensor],
    spread: Spread | None = None,
) -> float:
    """The candidate whose rounding has the least error on unseen tokens: from the largest down, while the error falls.

    `errors_of(damping, H)` gives the change [n, K] that rounding with the Hessian H makes in some rows. With `spread`
    it is called for each fold and candidate, otherwise only as often as needed.
    """

    def left(damping: float, fold: Fold, energy: float) -> float:
        error = errors_of(damping, fold.fitted.hessian)
        return float(((error @ fold.unseen.hessian) * error).sum()) / energy

    ordered = sorted(candidates, reverse=True)
    known: dict[float, float] = {}
    if spread is not None:
        known = dict(zip(ordered, _of_all_folds(left, ordered, folds, energies, spread), strict=True))

    def found(damping: float) -> float:
        return known[damping] if known else _of_all_folds(left, [damping], folds, energies, _in_turn)[0]

    best, *smaller = ordered
    least = found(best)
    for damping in smaller:
        value = found(damping)
        if value >= least:
            break
        best, least = damping, value
    return best


def _of_all_folds(
    left: Callable[[float, Fold, float], float],
    candidates: Sequence[float],
    folds: Sequence[Fold],
    energies: Sequence[float],
    spread: Spread,
) -> list[float]:
    """The error of each candidate, summed over all folds."""
    tasks = [
        partial(left, damping, fold, energy)
        for damping in candidates
        for fold, energy in zip(folds, energies, strict=True)
    ]
    parts = spread(tasks)
    return [sum(parts[start : start + len(folds)]) for start in range(0, len(parts), max(1, len(folds)))]


def _in_turn(tasks: Sequence[Callable[[], float]]) -> list[float]:
    return [task() for task in tasks]


def energy(weight: Tensor, seen: Moments) -> float:
    """The mean of |x W^T|^2 over tokens; 1 if the output is zero."""
    found = float((weight @ seen.hessian).mul_(weight).sum())
    return found if found > 0 else 1.0


def spaced_rows(count: int) -> Tensor:
    """The indices of SAMPLED_ROWS out of `count` rows, or of all, evenly spaced; int64."""
    taken = min(count, SAMPLED_ROWS)
    return torch.arange(taken) * count // max(1, taken)
