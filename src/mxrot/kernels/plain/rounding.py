"""GPTQ over a block of columns: the specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats.element import Element


@dataclass(frozen=True)
class RoundedColumns:
    """A block of columns after GPTQ has walked over it."""

    values: Tensor
    """Rounded values on the grid of the chosen scales, float64 [N, B]."""
    differences: Tensor
    """What each column, as the walk found it, lost by rounding: float64 [N, B]."""
    chosen: Tensor
    """Index of the scales that cost each row least, int64 [N]."""


def plain_round_columns(
    columns: Tensor, scales: Tensor, upper: Tensor, zeros: Tensor | None, element: Element
) -> RoundedColumns:
    """Round the columns of a block one after the other, and let those still open make up for the error of each.

    `columns` float64 [N, B]; `scales` float64 [C, N, B], of which each row keeps the one whose walk costs
    sum_j (difference_j / upper_jj)^2 least, of equals the first; `upper` float64 [B, B], the block on the diagonal
    of the Cholesky factor of the inverse Hessian; `zeros` float64 [N, B] codes that stand for 0, or None.
    """
    best: RoundedColumns | None = None
    least = columns.new_full((len(columns),), torch.inf)
    for index, candidate in enumerate(scales):
        values, differences = _walk(columns, candidate, upper, zeros, element)
        chosen = torch.full(least.shape, index, device=least.device)
        if best is None:
            best = RoundedColumns(values, differences, chosen)
        if len(scales) == 1:
            break
        cost = (differences / upper.diagonal()).square().sum(dim=1)
        better = cost < least
        least = torch.where(better, cost, least)
        best = RoundedColumns(
            torch.where(better[:, None], values, best.values),
            torch.where(better[:, None], differences, best.differences),
            torch.where(better, chosen, best.chosen),
        )
    assert best is not None
    return best


def _walk(
    columns: Tensor, scales: Tensor, upper: Tensor, zeros: Tensor | None, element: Element
) -> tuple[Tensor, Tensor]:
    """Rounded values and differences [N, B] under one set of scales."""
    ratios = upper / upper.diagonal()[:, None]
    # Transposed, so that each step works on contiguous rows; a step is a few short kernels, and their number is
    # what a GPU waits for.
    local = columns.t().clone(memory_format=torch.contiguous_format)  # of one row, contiguous() is no copy
    scale = scales.t().contiguous()
    divisor = torch.where(scale == 0, torch.inf, scale)
    zero = None if zeros is None else zeros.t().contiguous()
    rounded, differences = torch.empty_like(local), torch.empty_like(local)
    for j in range(len(local)):
        scaled = local[j] / divisor[j]
        if zero is None:
            torch.mul(element.round(scaled), scale[j], out=rounded[j])
        else:
            torch.mul(element.round(scaled + zero[j]) - zero[j], scale[j], out=rounded[j])
        torch.sub(local[j], rounded[j], out=differences[j])
        local[j + 1 :].addr_(ratios[j, j + 1 :], differences[j], alpha=-1)
    return rounded.t(), differences.t()
