"""GPTQ over a block of columns: the specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxrot.formats import E8M0_MAX_BYTE, BlockScales, Format, Grid, Parts, ScaleRule
from mxrot.formats.element import Element


@dataclass(frozen=True)
class RoundedColumns:
    """A block of columns after GPTQ has processed it."""

    values: Tensor
    """Rounded values on the grid of the chosen scales, float64 [N, B]."""
    differences: Tensor
    """The rounding error of each column, relative to its value just before rounding: float64 [N, B]."""
    chosen: Tensor
    """Index of the scales with the least cost for each row, int64 [N]."""


@dataclass(frozen=True)
class ReachedColumns:
    """A block of columns whose scales GPTQ chose when it reached the block."""

    values: Tensor
    """As in `RoundedColumns`."""
    differences: Tensor
    """As in `RoundedColumns`."""
    scales: BlockScales
    """One scale per row, [N, 1]."""


def plain_round_columns(
    columns: Tensor, scales: Tensor, upper: Tensor, zeros: Tensor | None, element: Element
) -> RoundedColumns:
    """Round the columns of a block one after the other, and let the open columns compensate for the error of each.

    `columns` float64 [N, B]. `scales` float64 [C, N, B], of which each row keeps the one with the least sum_j
    (difference_j / upper_jj)^2, the first if equal. `upper` float64 [B, B], the block on the diagonal of the Cholesky
    factor of the inverse Hessian. `zeros` float64 [N, B] codes that stand for 0, or None.
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
    """Rounded values and differences [N, B] with one set of scales."""
    ratios = upper / upper.diagonal()[:, None]
    # Transposed, so that each step works on contiguous rows. A step is a few short kernels, and a GPU waits for their
    # launches.
    local = columns.t().clone(memory_format=torch.contiguous_format)  # for one row, contiguous() would not copy
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


def plain_round_on_grid(columns: Tensor, upper: Tensor, parts: Parts, grid: Grid) -> RoundedColumns:
    """Round float64 `columns` [N, n] one after the other on any grid, with parts that have an entry per column or per
    row.

    The method is that of `plain_round_columns` with one set of scales.
    """
    ratios = upper / upper.diagonal()[:, None]
    local, differences = columns.clone(), torch.empty_like(columns)
    for j in range(columns.shape[1]):
        found = local[:, j].clone()
        local[:, j] = grid.round(found[:, None, None], parts.of_blocks(slice(j, j + 1)))[:, 0, 0]
        torch.sub(found, local[:, j], out=differences[:, j])
        local[:, j + 1 :].addr_(differences[:, j], ratios[j, j + 1 :], alpha=-1)
    return RoundedColumns(local, differences, torch.zeros(len(columns), dtype=torch.int64, device=columns.device))


def plain_round_reached(
    columns: Tensor,
    upper: Tensor,
    format: Format,
    rule: ScaleRule,
    offsets: tuple[int, ...],
    walk: Callable[[Tensor, Tensor, Tensor, Tensor | None, Element], RoundedColumns] = plain_round_columns,
) -> ReachedColumns:
    """Choose the scales of a block, float64 `columns` [N, B], and round it as `plain_round_columns` does.

    Each row tries the rule's exponent plus each of `offsets`. (0,) takes the rule's own scales, of any type.
    """
    width = columns.shape[1]
    scales = rule.choose(columns[:, None], format.element, format.scale)
    candidates = [shifted(scales, offset) for offset in offsets]
    values = torch.stack([candidate.values(torch.float64) for candidate in candidates])
    zeros = None if scales.zero_points is None else scales.zero_points.double().expand(-1, width)
    found = walk(columns, values.expand(-1, -1, width), upper, zeros, format.element)
    stored = torch.stack([candidate.stored for candidate in candidates])
    kept = stored.take_along_dim(found.chosen[None, :, None], dim=0)[0]
    return ReachedColumns(found.values, found.differences, replace(scales, stored=kept))


def shifted(scales: BlockScales, offset: int) -> BlockScales:
    """The scales times 2^offset, limited to the exponent range. Scales that are not E8M0 bytes allow only offset 0."""
    if offset == 0:
        return scales
    stored = (scales.stored.to(torch.int16) + offset).clamp(0, E8M0_MAX_BYTE)
    return replace(scales, stored=torch.where(scales.stored > E8M0_MAX_BYTE, scales.stored, stored.to(torch.uint8)))
