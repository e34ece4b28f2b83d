"""GPTQ's walk over the columns of a weight: each is rounded in turn, and the open columns make up for its error.

Several columns are rounded at a time (a block, or a piece of a very wide one). Among them each passes its error on at
once. The other columns of the span are then corrected for all of them together. The columns behind the span are
corrected once the whole span is done, so they are read and written less often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxrot.formats import BlockScales, Format, Parts, ScaleRule, Uniform
from mxrot.kernels import RoundedColumns, plain_round_on_grid, round_columns, round_reached

SPAN = 256
"""The columns within which the error of a block is corrected at once. Later columns wait until all of them are done."""
PIECE = 32
"""The number of columns rounded at a time in a block wider than a span."""

RoundUnder = Callable[[Tensor, Tensor, Tensor], RoundedColumns]
"""Rounds columns [N, n] along their diagonal block `upper` [n, n] of the factor. [n] gives the block index of each
column."""


def walk_fixed(
    blocks: Tensor, factor: Tensor, parts: Parts, order: Tensor, format: Format, first_order: float = 0.0
) -> tuple[Tensor, Tensor]:
    """GPTQ under given parts, with columns in `order` [K]. With `first_order` it uses `walk_drawn_back`.

    Returns values [N, G, B] on the grid of the parts, and each weight before rounding minus its rounded value [N, K].
    """
    block = blocks.shape[-1]
    group = order // block
    columns = blocks.flatten(-2)[:, order]
    result = torch.empty_like(columns)
    round_under = rounding_under(parts, format)

    def round_some(here: slice, lost: Tensor) -> None:
        found = round_under(columns[:, here], factor[here, here], group[here])
        result[:, here] = found.values
        lost.copy_(found.differences)

    if first_order:
        remainder = walk_drawn_back(columns, factor, block, round_some, first_order)
    else:
        remainder = walk(columns, factor, block, round_some)
    back = order.argsort()
    return result[:, back].view_as(blocks), remainder[:, back]


def walk_reached(
    blocks: Tensor,
    factor: Tensor,
    format: Format,
    rule: ScaleRule,
    offsets: tuple[int, ...],
    first_order: float = 0.0,
) -> tuple[Tensor, Tensor, Parts]:
    """GPTQ that chooses the parts of each block when it reaches the block.

    Returns values [N, G, B], each weight before rounding minus its rounded value [N, K], and the parts [N, G].
    `offsets` are the exponents to try, relative to the rule's; (0,) tries the rule's alone. Others need
    `walks_whole_blocks` and no `first_order`. With `first_order` the walk is `walk_drawn_back`.
    """
    block = blocks.shape[-1]
    columns = blocks.flatten(-2).clone()
    result = torch.empty_like(columns)
    reciprocals = factor.diagonal().reciprocal()
    chosen: list[Parts] = []

    def round_block(here: slice, lost: Tensor) -> None:
        into = result[:, here], lost
        found = round_reached(columns[:, here], factor[here, here], format, rule, offsets, reciprocals[here], into)
        chosen.append(found.scales)

    def round_some(here: slice, lost: Tensor) -> None:
        if here.start % block == 0:
            whole = columns[:, None, here.start : here.start + block]
            chosen.append(format.grid.choose(whole, rule))
        first = torch.zeros(here.stop - here.start, dtype=torch.int64, device=columns.device)
        found = rounding_under(chosen[-1], format)(columns[:, here], factor[here, here], first)
        result[:, here] = found.values
        lost.copy_(found.differences)

    if first_order:
        remainder = walk_drawn_back(columns, factor, block, round_some, first_order)
        return result.view_as(blocks), remainder, Parts.side_by_side(chosen)
    remainder = walk(columns, factor, block, round_block if walks_whole_blocks(format) else round_some)
    return result.view_as(blocks), remainder, Parts.side_by_side(chosen)


def walks_whole_blocks(format: Format) -> bool:
    """True if blocks are walked at once, scales included. Otherwise parts are chosen first and columns rounded under
    them."""
    return isinstance(format.grid, Uniform) and format.block is not None and format.block <= SPAN


def rounding_under(parts: Parts, format: Format) -> RoundUnder:
    """A function that rounds columns under the parts [N, G] of their blocks."""
    if not isinstance(parts, BlockScales):
        return lambda columns, upper, group: plain_round_on_grid(columns, upper, parts.of_blocks(group), format.grid)
    values, zeros = parts.values(torch.float64), parts.zero_points
    zeros = None if zeros is None else zeros.double()

    def round_uniform(columns: Tensor, upper: Tensor, group: Tensor) -> RoundedColumns:
        own = zeros if zeros is None else zeros[:, group]
        return round_columns(columns, values[None, :, group], upper, own, format.element)

    return round_uniform


def walk(columns: Tensor, factor: Tensor, block: int, round_some: Callable[[slice, Tensor], None]) -> Tensor:
    """Round `columns` [N, K] in blocks of `block`. Returns each weight before rounding minus its rounded value, [N, K].

    `round_some` rounds the columns of a slice and writes these differences into the given tensor. When it gets the
    first columns of a block, all columns of the block already make up for all earlier errors.
    """
    width = columns.shape[1]
    remainder, diagonal = torch.empty_like(columns), factor.diagonal()
    for start, stop, step in spans(width, block):
        for first in range(start, stop, step):
            here = slice(first, min(first + step, stop))
            round_some(here, remainder[:, here])
            spread(remainder, columns, here, stop, factor, diagonal)
        spread(remainder, columns, slice(start, stop), width, factor, diagonal)
    return remainder


def walk_drawn_back(
    columns: Tensor, factor: Tensor, block: int, round_some: Callable[[slice, Tensor], None], share: float
) -> Tensor:
    """Like `walk`, but each rounded column also takes the share b off the move of the open columns.

    With D the move of the open columns [N, K] so far, and e_j the error of column j over the factor's diagonal, D <- (1
    - b) D - e_j U_j (FOEM's first-order term, arXiv 2507.11017). One column is rounded at a time. Those behind a span
    of n columns get the sum of these steps, (1 - b)^n D - sum_j (1 - b)^(n - 1 - j) e_j U_j.
    """
    width, start = columns.shape[1], columns.clone()
    remainder, diagonal = torch.empty_like(columns), factor.diagonal()
    for first, stop, _ in spans(width, block):
        for column in range(first, stop):
            here, rest = slice(column, column + 1), slice(column + 1, stop)
            round_some(here, remainder[:, here])
            columns[:, rest].lerp_(start[:, rest], share)
            spread(remainder, columns, here, stop, factor, diagonal)
        span, behind = slice(first, stop), slice(stop, width)
        kept = (1 - share) ** torch.arange(stop - first, dtype=columns.dtype, device=columns.device).flip(0)
        columns[:, behind].lerp_(start[:, behind], 1 - (1 - share) ** (stop - first))
        errors = remainder[:, span] / diagonal[span] * kept
        columns[:, behind].addmm_(errors, factor[span, behind], alpha=-1)
    return remainder


def spans(width: int, block: int) -> Iterator[tuple[int, int, int]]:
    """The start and stop of each span, and how many of its columns are rounded at a time.

    A span holds whole blocks. A block wider than a span has its own spans, and is rounded in pieces.
    """
    longest, step = (SPAN // block * block, block) if block <= SPAN else (SPAN, PIECE)
    part = width if block <= SPAN else block
    for begin in range(0, width, part):
        for start in range(begin, begin + part, longest):
            yield start, min(start + longest, begin + part), step


def spread(remainder: Tensor, columns: Tensor, here: slice, stop: int, factor: Tensor, diagonal: Tensor) -> None:
    """Correct the columns [N, K] behind `here`, up to `stop`, for the errors of those in it; in place."""
    if here.stop < stop:
        errors = remainder[:, here] / diagonal[here]
        columns[:, here.stop : stop].addmm_(errors, factor[here, here.stop : stop], alpha=-1)
