"""GPTQ (arXiv 2210.17323) for block formats, with both orders of scales of MR-GPTQ (2509.23202, section 4).

Columns are rounded one after the other; the error of each is spread over the columns still open, along the
inverse Hessian of the inputs. A block's scales must be fixed before its first column is rounded:
`scales = "reached"` takes them from the updated weights when the walk reaches the block, `scales = "walked"` also
walks the block under the exponents next to those and keeps what costs each row least in the objective itself
(sum_j (difference_j / U_jj)^2, the block's own part of it), `scales = "fixed"` takes all of them from the weights
as they came. Only then may `columns = "descending"` walk in order of
decreasing diagonal of H, because a block's columns need not be neighbours in that order (codes are put back
in place afterwards; nothing is shuffled at run time).

`target` says what the quantized linear shall reproduce. "own": what the weights give on the inputs it will really
see. "original": what the original linear gives in the original model, which makes up for part of the error of
everything before it (GPTAQ, arXiv 2504.02692; Qronos, 2505.11695). "residual" (ours): where the output is added to
the residual stream, what is missing there from the original's. With D the difference between target and own
output, and x the quantized inputs, the quadratic objective has its minimum at W + E[D^T x] (H + d I)^-1; GPTQ then
starts from there, and nothing else changes.

All arithmetic is float64. With H a multiple of the identity nothing is spread and the codes equal rounding to
nearest bit for bit (but for a weight of -0, which may come out as +0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mxrot.errors import ConfigError, NumericsError
from mxrot.formats import BlockScales, Format, ScaleRule, check_finite, encode_blocks
from mxrot.kernels import round_columns, round_reached
from mxrot.rounding.base import Prepared, Requirements, Rounded, RoundingMethod, Target
from mxrot.rounding.linalg import inverse_factor

NEIGHBOURS = (0, -1, 1)
"""Exponents that `scales = "walked"` tries, relative to the rule's; of equals the first is kept."""
SPAN = 256
"""Columns within which the error of a block is made up for at once; those behind wait until all of them are done."""


@dataclass(frozen=True)
class GPTQ(RoundingMethod):
    """Error-compensated rounding along the Hessian of the quantized inputs."""

    name = "gptq"

    damping: float = 0.01
    """Added to the diagonal of H, relative to its mean."""
    scales: Literal["reached", "walked", "fixed"] = "reached"
    columns: Literal["natural", "descending"] = "natural"
    target: Target = "own"
    target_damping: float = 0.01
    """The same as `damping`, in the regression that leads to the target."""
    tokens: Literal["equal", "relative"] = "equal"
    """How much each token counts: as it is, or (where outputs go into the residual stream) relative to its size."""

    @property
    def requirements(self) -> Requirements:
        return Requirements(True, self.target, self.tokens == "relative")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("damping", "target_damping"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"rounding gptq: {key} must be positive and finite, got {getattr(self, key)}")
        if self.scales != "fixed" and self.columns == "descending":
            raise ConfigError('rounding gptq: columns = "descending" needs scales = "fixed"')

    def check(self, format: Format, rule: ScaleRule) -> None:
        if self.scales != "fixed" and rule.looks_at_whole_tensor(format.scale):
            raise ConfigError(
                f"rounding gptq: the scale rule {rule.name!r} of {format.name} looks at the whole tensor; "
                'set scales = "fixed"'
            )
        if self.scales == "walked" and not rule.is_power_of_two:
            raise ConfigError(f'rounding gptq: scales = "walked" needs power-of-two scales, not rule {rule.name!r}')

    def prepare(self, hessian: Tensor | None, shifts: Sequence[Tensor], name: str) -> Prepared:
        assert hessian is not None
        order = None
        if self.columns == "descending":
            order = hessian.diagonal().argsort(descending=True, stable=True)
        if shifts:
            # First, and let go: it needs the Hessian as it is, and the factor takes the place of that.
            regression, _ = inverse_factor(hessian, self.target_damping, name)
            for shift in shifts:
                shift.copy_((shift @ regression.t()) @ regression)
            del regression
        if order is not None:
            hessian = hessian[order[:, None], order]
        factor, damping = inverse_factor(hessian, self.damping, name, overwrites=True)
        return Prepared(factor, order, damping)

    def round_rows(
        self, weight: Tensor, format: Format, rule: ScaleRule, prepared: Prepared, name: str, move: Tensor | None = None
    ) -> Rounded:
        factor, order = prepared.factor, prepared.order
        assert factor is not None
        check_finite(weight, name)
        weight = weight.double()
        if move is not None:
            weight = weight + move
        if order is None:
            order = torch.arange(weight.shape[1], device=weight.device)
        blocks = weight.unflatten(-1, (-1, format.block))
        if self.scales == "fixed":
            scales = rule.choose(blocks, format.element, format.scale)
            rounded, remainder = walk_fixed(blocks, factor, scales, order, format)
        else:
            offsets = NEIGHBOURS if self.scales == "walked" else NEIGHBOURS[:1]
            rounded, remainder, scales = walk_reached(blocks, factor, format, rule, offsets)
        if not torch.isfinite(scales.values()).all():
            raise NumericsError(
                f"{name}: a block scale overflows {scales.type.name}; the largest |x| is {weight.abs().max():.3g}"
            )
        return Rounded(encode_blocks(rounded, scales, format), remainder, prepared.damping)


def walk_fixed(
    blocks: Tensor, factor: Tensor, scales: BlockScales, order: Tensor, format: Format
) -> tuple[Tensor, Tensor]:
    """GPTQ under given scales, columns in `order` [K].

    Values [N, G, B] that lie on the grid of the scales, and what rounding took away from each weight [N, K].
    """
    values, zeros = scales.values(torch.float64), _zero_points(scales)
    group = order // format.block_in(len(order))
    columns = blocks.flatten(-2)[:, order]
    result = torch.empty_like(columns)

    def round_block(here: slice) -> Tensor:
        column_zeros = zeros if zeros is None else zeros[:, group[here]]
        upper = factor[here, here]
        found = round_columns(columns[:, here], values[None, :, group[here]], upper, column_zeros, format.element)
        result[:, here] = found.values
        return found.differences

    remainder = walk(columns, factor, format.block_in(columns.shape[1]), round_block)
    back = order.argsort()
    return result[:, back].unflatten(-1, (-1, format.block)), remainder[:, back]


def walk_reached(
    blocks: Tensor, factor: Tensor, format: Format, rule: ScaleRule, offsets: tuple[int, ...]
) -> tuple[Tensor, Tensor, BlockScales]:
    """GPTQ that chooses the scales of a block when it gets there.

    Values [N, G, B], what rounding took away from each weight [N, K], and the scales [N, G]. `offsets` are the
    exponents to try, relative to the rule's; (0,) takes the rule's as they are.
    """
    columns = blocks.flatten(-2).clone()
    result = torch.empty_like(columns)
    chosen: list[BlockScales] = []

    def round_block(here: slice) -> Tensor:
        found = round_reached(columns[:, here], factor[here, here], format, rule, offsets)
        result[:, here] = found.values
        chosen.append(found.scales)
        return found.differences

    remainder = walk(columns, factor, format.block_in(columns.shape[1]), round_block)
    zero_points = None
    if chosen[0].zero_points is not None:
        zero_points = torch.cat([scales.zero_points for scales in chosen if scales.zero_points is not None], dim=1)
    stored = torch.cat([scales.stored for scales in chosen], dim=1)
    scales = replace(chosen[0], stored=stored, zero_points=zero_points)
    return result.unflatten(-1, (-1, format.block)), remainder, scales


def walk(columns: Tensor, factor: Tensor, block: int, round_block: Callable[[slice], Tensor]) -> Tensor:
    """Round `columns` [N, K] block after block; what rounding took away from each, [N, K].

    `round_block` rounds the columns of a slice and gives their differences. Those soon to come make up for these at
    once, those further off for many blocks together: they are read and written once for all of them.
    """
    width = columns.shape[1]
    span = max(SPAN // block, 1) * block
    remainder = torch.empty_like(columns)
    for start in range(0, width, span):
        stop = min(start + span, width)
        for first in range(start, stop, block):
            here = slice(first, first + block)
            remainder[:, here] = round_block(here)
            spread(remainder, columns, here, stop, factor)
        spread(remainder, columns, slice(start, stop), width, factor)
    return remainder


def spread(remainder: Tensor, columns: Tensor, here: slice, stop: int, factor: Tensor) -> None:
    """Let the columns [N, K] behind `here`, up to `stop`, make up for what those in it have lost; in place."""
    if here.stop < stop:
        errors = remainder[:, here] / factor.diagonal()[here]
        columns[:, here.stop : stop].addmm_(errors, factor[here, here.stop : stop], alpha=-1)


def _zero_points(scales: BlockScales) -> Tensor | None:
    return None if scales.zero_points is None else scales.zero_points.double()
