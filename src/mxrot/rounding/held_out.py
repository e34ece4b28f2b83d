"""How strongly a regression, or GPTQ, is damped: by what it leaves on tokens that it has not seen.

A site with weights W, whose outputs lack d of the target on inputs x, is left with |(Q - W) x - d|^2 a token by weights
Q. Of other tokens than those that Q was made from this takes their moments alone, H = E[x^T x] and C = E[d^T x], up to
a constant: tr((Q - W) H (Q - W)^T) - 2 tr((Q - W) C^T). Relative to tr(W H W^T), the energy of the outputs, folds can
be added up.

Two things are chosen by it, one after the other, because rounding adds to what the regression leaves nearly the same
whatever that is. The damping of the regression by its own weights, M = C (H + c I)^-1, with infinity for M = 0, the
target "own". The damping of GPTQ by really rounding a sample of rows: scales grow with what is passed on, which no
formula for the error of a column knows.

`Fold` says what is fitted to and what is left on: a kind of text and another kind, so that what is taken for a rule and
is a habit of one kind costs on the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Spread = Callable[[Sequence[Callable[[], float]]], list[float]]
"""Gives what tasks give, each of which may be done somewhere else; see `World.spread`."""
SAMPLED_ROWS = 128
"""Rows that are rounded to choose a damping, evenly spaced among those of a site."""


@dataclass(frozen=True)
class Moments:
    """What some tokens say of a site."""

    hessian: Tensor
    """The mean of x^T x, float64 [K, K]."""
    shift: Tensor | None
    """The mean of d^T x, float64 [N, K]; None for the target "own"."""
    tokens: int

    @staticmethod
    def together(parts: Sequence[Moments]) -> Moments:
        """Those of the tokens of all parts, in the tensors of the first one, which is overwritten."""
        tokens = sum(part.tokens for part in parts)
        (first, *others) = parts
        for total in (first.hessian, first.shift):
            if total is not None:
                total.mul_(first.tokens / tokens).add_(0.0)  # -0 becomes +0, as when a matrix is added
        for part in others:
            first.hessian.add_(part.hessian, alpha=part.tokens / tokens)
            if first.shift is not None and part.shift is not None:
                first.shift.add_(part.shift, alpha=part.tokens / tokens)
        return Moments(first.hessian, first.shift, tokens)


@dataclass(frozen=True)
class Fold:
    """Tokens to fit to, and others that say what it is worth."""

    fitted: Moments
    unseen: Moments


def left_on(move: Tensor, seen: Moments) -> float:
    """What weights that are changed by `move` [n, K] leave on these tokens, less what unchanged ones do: per token, the
    mean of |move x - d|^2 - |d|^2; of n rows."""
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
    """The candidate whose regression leaves least on unseen tokens, folds relative to their `energies`; of equals the
    largest, and infinity stands for no regression.

    `factor_of(damping, H)` gives U with U^T U the inverse of the damped H, as `inverse_factor` does. With `spread` it
    is asked for each fold and candidate there.
    """

    def left(damping: float, fold: Fold, energy: float) -> float:
        assert fold.fitted.shift is not None
        factor = factor_of(damping, fold.fitted.hessian)
        move = (fold.fitted.shift @ factor.t()) @ factor
        del factor  # as large as a Hessian, of which the next factor takes two
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
    """The candidate whose rounding leaves least on unseen tokens: from the largest down, as long as each leaves less.

    `errors_of(damping, H)` gives what rounding some rows with the Hessian H changes in them, [n, K]. With `spread` it
    is asked for each fold and candidate there; otherwise for no more than it takes.
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
    """Of each candidate what it leaves, over all folds."""
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
    """The mean of |x W^T|^2 over tokens; 1 where nothing comes out."""
    found = float((weight @ seen.hessian).mul_(weight).sum())
    return found if found > 0 else 1.0


def spaced_rows(count: int) -> Tensor:
    """SAMPLED_ROWS of so many rows, or all, evenly spaced; int64."""
    taken = min(count, SAMPLED_ROWS)
    return torch.arange(taken) * count // max(1, taken)
