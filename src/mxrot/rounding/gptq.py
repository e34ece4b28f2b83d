"""GPTQ (arXiv 2210.17323) for block formats, with both orders of scales of MR-GPTQ (2509.23202, section 4).

Columns are rounded one after the other; the error of each is spread over the columns still open, along the
inverse Hessian of the inputs. A block's scales must be fixed before its first column is rounded:
`scales = "reached"` takes them from the updated weights when the walk reaches the block, `scales = "fixed"`
takes all of them from the weights as they came. Only then may `columns = "descending"` walk in order of
decreasing diagonal of H, because a block's columns need not be neighbours in that order (codes are put back
in place afterwards; nothing is shuffled at run time).

All arithmetic is float64. With H a multiple of the identity nothing is spread and the codes equal rounding to
nearest bit for bit (but for a weight of -0, which may come out as +0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mxrot.errors import ConfigError, NumericsError
from mxrot.formats import BlockScales, Format, ScaleRule, encode_blocks
from mxrot.rounding.base import Rounded, RoundingMethod
from mxrot.rounding.linalg import inverse_factor


@dataclass(frozen=True)
class GPTQ(RoundingMethod):
    """Error-compensated rounding along the Hessian of the quantized inputs."""

    name = "gptq"
    needs_hessian = True

    damping: float = 0.01
    """Added to the diagonal of H, relative to its mean."""
    scales: Literal["reached", "fixed"] = "reached"
    columns: Literal["natural", "descending"] = "natural"

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise ConfigError(f"rounding gptq: damping must be positive and finite, got {self.damping}")
        if self.scales == "reached" and self.columns == "descending":
            raise ConfigError('rounding gptq: columns = "descending" needs scales = "fixed"')

    def check(self, format: Format, rule: ScaleRule) -> None:
        if self.scales == "reached" and rule.looks_at_whole_tensor(format.scale):
            raise ConfigError(
                f"rounding gptq: the scale rule {rule.name!r} of {format.name} looks at the whole tensor; "
                'set scales = "fixed"'
            )

    def round(self, weight: Tensor, format: Format, rule: ScaleRule, hessian: Tensor | None, name: str) -> Rounded:
        assert hessian is not None
        if not torch.isfinite(weight).all():
            raise NumericsError(
                f"{name}: holds NaN or Inf and cannot be quantized; check the model's weights and data type"
            )
        order = torch.arange(weight.shape[1], device=weight.device)
        if self.columns == "descending":
            order = hessian.diagonal().argsort(descending=True, stable=True)
        factor, damping = inverse_factor(hessian[order][:, order], self.damping, name)
        blocks = weight.double().unflatten(-1, (-1, format.block))
        if self.scales == "fixed":
            scales = rule.choose(blocks, format.element, format.scale)
            rounded = walk_fixed(blocks, factor, scales, order, format)
        else:
            rounded, scales = walk_reached(blocks, factor, format, rule)
        if not torch.isfinite(scales.values()).all():
            raise NumericsError(
                f"{name}: a block scale overflows {scales.type.name}; the largest |x| is {weight.abs().max():.3g}"
            )
        return Rounded(encode_blocks(rounded, scales, format), damping)


def walk_fixed(blocks: Tensor, factor: Tensor, scales: BlockScales, order: Tensor, format: Format) -> Tensor:
    """GPTQ under given scales, columns in `order` [K]; values [N, G, B] that lie on the grid of the scales."""
    values, zeros = scales.values(torch.float64), _zero_points(scales)
    group = order // format.block
    columns = blocks.flatten(-2)[:, order]
    result = torch.empty_like(columns)
    for start in range(0, len(order), format.block):
        here = slice(start, start + format.block)
        column_zeros = zeros if zeros is None else zeros[:, group[here]]
        result[:, here] = walk_block(columns, here, factor, values[:, group[here]], column_zeros, format)
    return result[:, order.argsort()].unflatten(-1, (-1, format.block))


def walk_reached(blocks: Tensor, factor: Tensor, format: Format, rule: ScaleRule) -> tuple[Tensor, BlockScales]:
    """GPTQ that chooses the scales of a block when it gets there; values [N, G, B] and the scales [N, G]."""
    columns = blocks.flatten(-2).clone()
    result = torch.empty_like(columns)
    chosen = []
    for start in range(0, columns.shape[1], format.block):
        here = slice(start, start + format.block)
        scales = rule.choose(columns[:, None, here], format.element, format.scale)
        spread = scales.values(torch.float64).expand(-1, format.block)
        zeros = _zero_points(scales)
        column_zeros = zeros if zeros is None else zeros.expand(-1, format.block)
        result[:, here] = walk_block(columns, here, factor, spread, column_zeros, format)
        chosen.append(scales)
    zero_points = None
    if chosen[0].zero_points is not None:
        zero_points = torch.cat([scales.zero_points for scales in chosen if scales.zero_points is not None], dim=1)
    stored = torch.cat([scales.stored for scales in chosen], dim=1)
    return result.unflatten(-1, (-1, format.block)), replace(chosen[0], stored=stored, zero_points=zero_points)


def walk_block(
    columns: Tensor, here: slice, factor: Tensor, scales: Tensor, zeros: Tensor | None, format: Format
) -> Tensor:
    """Round columns `here` of `columns` [N, K] under column scales [N, B], and spread the errors over the rest.

    Returns the rounded values [N, B]. `columns` is updated in place behind `here`; what it holds in `here`
    afterwards is of no use.
    """
    upper = factor[here, here]
    diagonal = upper.diagonal()
    ratios = upper / diagonal[:, None]
    # Transposed, so that each step works on contiguous rows; a step is a few short kernels, and their number is
    # what a GPU waits for.
    local = columns[:, here].t().contiguous()
    scale = scales.t().contiguous()
    divisor = torch.where(scale == 0, torch.inf, scale)
    zero = None if zeros is None else zeros.t().contiguous()
    rounded, differences = torch.empty_like(local), torch.empty_like(local)
    for j in range(len(local)):
        scaled = local[j] / divisor[j]
        if zero is None:
            torch.mul(format.element.round(scaled), scale[j], out=rounded[j])
        else:
            torch.mul(format.element.round(scaled + zero[j]) - zero[j], scale[j], out=rounded[j])
        torch.sub(local[j], rounded[j], out=differences[j])
        local[j + 1 :].addr_(ratios[j, j + 1 :], differences[j], alpha=-1)
    columns[:, here.stop :].addmm_((differences / diagonal[:, None]).t(), factor[here, here.stop :], alpha=-1)
    return rounded.t()


def _zero_points(scales: BlockScales) -> Tensor | None:
    return None if scales.zero_points is None else scales.zero_points.double()
