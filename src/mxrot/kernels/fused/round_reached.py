"""GPTQ over one block of columns, with the choice of the block's scales, in one kernel (Triton).

Rows do not depend on each other. A program processes a few of them through all columns of the block, with all candidate
scales side by side, without leaving its registers. `plain_round_reached` is the specification. The kernel multiplies by
reciprocals of the diagonal and may fuse a multiplication with an addition, so a weight on a rounding boundary may fall
on the other side. All arithmetic is float64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.formats import BlockScales, Format, ScaleRule
from mxrot.formats.element import FloatElement
from mxrot.kernels.plain import ReachedColumns

ROWS = 2
_FRACTION_BITS = tl.constexpr(52)
_FRACTION = tl.constexpr((1 << 52) - 1)
_EXPONENT_BITS = tl.constexpr(0x7FF0000000000000)
_SIGN_BIT = tl.constexpr(-0x8000000000000000)


@triton.jit
def _power_of_two(exponents):
    """2^e in float64 for the exponents of normal numbers."""
    return ((exponents.to(tl.int64) + 1023) << _FRACTION_BITS).to(tl.float64, bitcast=True)


@triton.jit
def _rounded(scaled, smallest_normal, steps, largest):
    """Round float64 to the nearest element, ties to even, by adding 2^52 of its steps (`steps` times its binade)."""
    magnitude = tl.minimum(tl.abs(scaled), largest)
    binade = (magnitude.to(tl.int64, bitcast=True) & _EXPONENT_BITS).to(tl.float64, bitcast=True)
    power = tl.maximum(binade, smallest_normal) * steps
    rounded = (magnitude + power) - power
    sign = scaled.to(tl.int64, bitcast=True) & _SIGN_BIT
    return (rounded.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)


@triton.jit
def _of_chosen(tile, is_chosen):
    """The chosen candidates of [CANDIDATES, ROWS, B], as [ROWS, B]. It works on bits: adding zeros would lose the sign
    of -0."""
    bits = tl.where(is_chosen[:, :, None], tile.to(tl.int64, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float64, bitcast=True)


@triton.jit
def _round_reached(
    columns_pointer,
    upper_pointer,
    reciprocals_pointer,
    values_pointer,
    differences_pointer,
    stored_pointer,
    rows_in_all,
    columns_stride,
    values_stride,
    differences_stride,
    upper_stride,
    offset_0,
    offset_1,
    offset_2,
    offset_3,
    candidates,
    raises_from,
    max_exponent,
    smallest_normal,
    steps,
    largest,
    ROWS: tl.constexpr,
    B: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, B)
    candidate = tl.arange(0, CANDIDATES)
    inside = rows < rows_in_all
    mask = inside[:, None]
    start = tl.load(columns_pointer + rows[:, None] * columns_stride + columns[None, :], mask=mask, other=0.0)

    # As integers, the bits of |x| have the order of the numbers, with NaN at the top.
    bits = tl.max(tl.abs(start).to(tl.int64, bitcast=True), axis=1)
    raised = ((bits & _FRACTION) >= raises_from).to(tl.int32)
    exponents = (bits >> _FRACTION_BITS).to(tl.int32) - 1023 - max_exponent + raised
    exponents = tl.minimum(tl.maximum(exponents, -127), 127)
    is_finite = bits < _EXPONENT_BITS
    offsets = tl.where(candidate < 2, tl.where(candidate == 0, offset_0, offset_1), offset_2)
    offsets = tl.where(candidate == 3, offset_3, offsets)
    tried = tl.minimum(tl.maximum(exponents[None, :] + offsets[:, None], -127), 127)
    scales = tl.where(is_finite[None, :], _power_of_two(tried), float("nan"))
    inverses = _power_of_two(-tried)

    tile = tl.broadcast_to(start[None, :, :], [CANDIDATES, ROWS, B])
    for j in range(B):
        weight = tl.sum(tl.where((columns == j)[None, None, :], tile, 0.0), axis=2)
        difference = weight - _rounded(weight * inverses, smallest_normal, steps, largest) * scales
        error = difference * tl.load(reciprocals_pointer + j)
        upper = tl.load(upper_pointer + j * upper_stride + columns)
        # A rounded column keeps the value that it had just before rounding.
        tile = tl.where((columns > j)[None, None, :], tile - error[:, :, None] * upper[None, None, :], tile)

    values = _rounded(tile * inverses[:, :, None], smallest_normal, steps, largest) * scales[:, :, None]
    differences = tile - values
    errors = differences * tl.load(reciprocals_pointer + columns)[None, None, :]
    cost = tl.sum(errors * errors, axis=2)
    cost = tl.where((candidate < candidates)[:, None] & (cost == cost), cost, float("inf"))
    least = tl.min(cost, axis=0)
    chosen = tl.min(tl.where(cost == least[None, :], candidate[:, None], CANDIDATES), axis=0)
    is_chosen = candidate[:, None] == chosen[None, :]
    place = rows[:, None] * values_stride + columns[None, :]
    tl.store(values_pointer + place, _of_chosen(values, is_chosen), mask=mask)
    place = rows[:, None] * differences_stride + columns[None, :]
    tl.store(differences_pointer + place, _of_chosen(differences, is_chosen), mask=mask)
    stored = tl.where(is_finite, tl.sum(tl.where(is_chosen, tried, 0), axis=0) + 127, 255)
    tl.store(stored_pointer + rows, stored.to(tl.uint8), mask=inside)


def round_reached(
    columns: Tensor,
    upper: Tensor,
    format: Format,
    rule: ScaleRule,
    offsets: tuple[int, ...],
    reciprocals: Tensor,
    into: tuple[Tensor, Tensor],
) -> ReachedColumns:
    """The function `plain_round_reached`, for a FloatElement in blocks of a power of two with E8M0 scales.

    For a rule with `raises_from`, and at most four offsets. `reciprocals` [B] are those of the diagonal of `upper`.
    Values and differences [N, B] are written to the tensors `into`, whose rows may be parts of the rows of a larger
    matrix.
    """
    element = format.element
    assert isinstance(element, FloatElement) and rule.raises_from is not None
    rows, width = columns.shape
    columns = columns if columns.stride(1) == 1 else columns.contiguous()
    upper = upper if upper.stride(1) == 1 else upper.contiguous()
    values, differences = into
    assert values.stride(1) == differences.stride(1) == reciprocals.stride(0) == 1
    stored = torch.empty(rows, 1, dtype=torch.uint8, device=columns.device)
    _round_reached[(triton.cdiv(rows, ROWS),)](
        columns,
        upper,
        reciprocals,
        values,
        differences,
        stored,
        rows,
        columns.stride(0),
        values.stride(0),
        differences.stride(0),
        upper.stride(0),
        *offsets,
        *[0] * (4 - len(offsets)),
        len(offsets),
        rule.raises_from(element, 1 << _FRACTION_BITS.value),
        element.max_exponent,
        math.ldexp(1.0, element.min_exponent),
        math.ldexp(1.0, _FRACTION_BITS.value - element.fraction_bits),
        element.max,
        ROWS=ROWS,
        B=width,
        CANDIDATES=triton.next_power_of_2(len(offsets)),
        num_warps=1,
    )
    return ReachedColumns(values, differences, BlockScales(stored, format.scale))
