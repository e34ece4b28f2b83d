"""Integer inputs, and their product with weights whose codes are looked up in levels: the specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats import Format, ScaleRule, unpack_codes
from mxrot.formats.element import IntElement

AT_ONCE = 1 << 24
"""Weights that `plain_look_up_product` dequantizes at one time."""


@dataclass(frozen=True)
class IntegerRows:
    """Rows of integers, each with one scale."""

    codes: Tensor
    """int8 [..., K], from -127 to 127."""
    scales: Tensor
    """float32 [..., 1]; NaN for a row that held NaN or Inf, or whose scale overflows."""

    @property
    def values(self) -> Tensor:
        """The values of the codes, float32 [..., K]."""
        return self.codes * self.scales


def plain_quantize_rows(x: Tensor, format: Format, rule: ScaleRule) -> IntegerRows:
    """Q(x) for an integer format with one scale per row, without zero points, which are subtracted.

    The codes of a row that held NaN or Inf are 0.
    """
    element = format.element
    assert isinstance(element, IntElement) and format.block is None
    blocks = x.to(torch.float32)[..., None, :]
    chosen = format.uniform.choose(blocks, rule)
    scales = chosen.values()
    is_finite = scales.isfinite()
    codes = format.grid.encode(torch.where(is_finite[..., None], blocks, 0.0), chosen)
    unit = 2.0**element.step_exponent
    integers = element.decode(codes) / unit
    if chosen.zero_points is not None:
        integers = integers - chosen.zero_points.to(torch.float32)[..., None]
    integers = torch.where(is_finite[..., None], integers, 0.0)
    return IntegerRows(integers.to(torch.int8).flatten(-2), torch.where(is_finite, scales * unit, torch.nan))


def plain_look_up_product(
    inputs: IntegerRows, packed: Tensor, scales: Tensor, levels: Tensor, dtype: torch.dtype
) -> Tensor:
    """`inputs` [..., K] times weights scale * levels[code]: `dtype` [..., N].

    `packed` uint8 [N, K/4], `scales` float16 [N, G], `levels` int8 [N, G, 4]. The product of a group is an exact
    integer. Its products with the group scales are added in float32, group by group, and the row scale is applied last.
    """
    rows, groups = scales.shape
    x = inputs.codes.flatten(0, -2).unflatten(-1, (groups, -1)).transpose(0, 1).double()  # [G, M, B]
    at_once = max(1, AT_ONCE // max(1, 4 * packed.shape[1]))
    pieces = zip(*(tensor.split(at_once) for tensor in (packed, scales, levels)), strict=True)
    sums = torch.cat([_product(x, *piece) for piece in pieces], dim=1)
    product = sums.view(*inputs.codes.shape[:-1], rows) * inputs.scales
    return product.to(dtype)


def _product(x: Tensor, packed: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """The product with some rows of weights, float32 [M, rows]; x float64 [G, M, B]."""
    values = looked_up(packed, levels).transpose(0, 1)  # [G, rows, B]
    # Integers below 2^53 are exact in float64, in any order.
    exact = (x @ values.double().mT).to(torch.float32)
    total = exact.new_zeros(exact.shape[1:])
    for each, scale in zip(exact, scales.to(torch.float32).t(), strict=True):
        total = total + each * scale
    return total


def looked_up(packed: Tensor, levels: Tensor) -> Tensor:
    """The levels of the codes, int8 [N, G, B], from uint8 [N, K/4] and int8 [N, G, 4]."""
    codes = unpack_codes(packed, 2).unflatten(-1, (levels.shape[1], -1))
    return levels.gather(2, codes.to(torch.int64))


def in_planes(codes: Tensor) -> Tensor:
    """`codes` [..., K] in the order in which `fused.look_up` multiplies them.

    Column 16 w + 8 h + 2 b + p moves to (2 p + h) K/4 + 4 w + b. Four bytes then hold four columns that are two apart.
    """
    return codes.unflatten(-1, (-1, 2, 4, 2)).permute(*range(codes.dim() - 1), -1, -3, -4, -2).flatten(-4)


def out_of_planes(codes: Tensor) -> Tensor:
    """The inverse of `in_planes`."""
    return codes.unflatten(-1, (2, 2, -1, 4)).permute(*range(codes.dim() - 1), -2, -3, -1, -4).flatten(-4)
