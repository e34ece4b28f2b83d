"""A few rows of bfloat16 times MXFP8 or MXFP4 weights, which stay in codes (Triton).

For generation the head is read once for a few rows, so its bytes set the pace. A program goes along a few rows of the
weight and all of K, and takes codes apart in registers, two by a few instructions (packed_rows.py): they are the first
operand of the product, and the inputs, which all programs share and the L2 cache holds, are the second. With as many
rows of weights as a vocabulary has there are programs enough for every device, and nothing is split along K.

Every number of a code times its scale is a bfloat16 number, so products are exact; sums are float32, in an order that
depends on the tile. `plain.plain_coded_product` is the specification up to that order. Rows of weights with a scale
above 2^60, or NaN, give NaN; blocks with scales below 2^-60 lose bits. Triton's interpreter has no bfloat16 products:
there both operands are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.formats import TensorQuantizer
from mxrot.kernels.fused.arithmetic import product
from mxrot.kernels.fused.packed_rows import RowLayout, are_in_range, columns_of, numbers_of
from mxrot.kernels.plain.coded_weights import CodedWeight

BLOCK = 32
COLUMNS = 128
"""Of K, at a time."""


@dataclass(frozen=True)
class Tile:
    """What a program takes."""

    weights: int
    """Rows of the weight."""
    inputs: int
    """Rows of the inputs."""
    warps: int
    stages: int


FIXED = Tile(64, 16, 4, 3)
"""Where a row must not depend on those beside it."""


def tile_for(rows: int) -> Tile:
    """For so many rows of inputs: all of them in one program, up to 128, so that codes are taken apart once."""
    if rows <= 16:
        return FIXED
    return Tile(64, 32, 4, 3) if rows <= 32 else Tile(64, 64, 4, 3) if rows <= 64 else Tile(64, 128, 8, 3)


@triton.jit
def _coded_product(
    x_pointer,
    units_pointer,
    scales_pointer,
    out_pointer,
    rows_in_all,
    weights_in_all,
    columns_in_all,
    BITS: tl.constexpr,
    FRACTION: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    INPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    UNITS: tl.constexpr = COLUMNS * BITS // 16
    GROUPS: tl.constexpr = COLUMNS // 32
    weight = (tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)).to(tl.int64)
    row = (tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)).to(tl.int64)
    column = columns_of(COLUMNS, BITS)
    unit, group = tl.arange(0, UNITS), tl.arange(0, GROUPS)
    units_in_all, groups_in_all = columns_in_all * BITS // 16, columns_in_all // 32
    total = tl.zeros([WEIGHTS, INPUTS], dtype=tl.float32)
    in_range = tl.full([WEIGHTS], 1, tl.int32)
    for start in tl.range(0, columns_in_all, COLUMNS, num_stages=STAGES):
        own_unit, own_group = start * BITS // 16 + unit, start // 32 + group
        units = tl.load(
            units_pointer + weight[:, None] * units_in_all + own_unit[None, :],
            mask=(weight < weights_in_all)[:, None] & (own_unit < units_in_all)[None, :],
            other=0,
        )
        scales = tl.load(
            scales_pointer + weight[:, None] * groups_in_all + own_group[None, :],
            mask=(weight < weights_in_all)[:, None] & (own_group < groups_in_all)[None, :],
            other=0,
        )
        own_column = start + column
        x = tl.load(
            x_pointer + row[None, :] * columns_in_all + own_column[:, None],
            mask=(row < rows_in_all)[None, :] & (own_column < columns_in_all)[:, None],
            other=0.0,
        )
        numbers = numbers_of(units, scales, None, BITS, FRACTION, MIN_EXPONENT, DTYPE)
        in_range = in_range & are_in_range(scales, FRACTION).to(tl.int32)
        total = product(numbers, x.to(DTYPE), total, 1, DTYPE)
    total = tl.where((in_range > 0)[:, None], total * 2.0**60, float("nan"))
    place = row[None, :] * weights_in_all + weight[:, None]
    inside = (row < rows_in_all)[None, :] & (weight < weights_in_all)[:, None]
    tl.store(out_pointer + place, total.to(out_pointer.dtype.element_ty), mask=inside)


def layout_of(weight: CodedWeight) -> RowLayout | None:
    """How the kernel reads codes of this format; None where it does not."""
    format = weight.format
    if format.block != BLOCK or format.bits not in (4, 8):
        return None
    found = RowLayout.of(TensorQuantizer(format, format.rule("even")), BLOCK) if "even" in format.rules else None
    return None if found is None or found.is_integer else found


def coded_product(x: Tensor, weight: CodedWeight, dtype: torch.dtype, is_fixed: bool = False) -> Tensor:
    """`dtype` [..., N] of bfloat16 x [..., K]; with `is_fixed` a row has the bits that it has alone.

    For formats of which `layout_of` knows how they are read.
    """
    layout = layout_of(weight)
    assert layout is not None and x.dtype == torch.bfloat16
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    (rows, columns), count = flat.shape, len(weight.codes)
    out = torch.empty(rows, count, dtype=dtype, device=x.device)
    if out.numel():
        tile = FIXED if is_fixed else tile_for(rows)
        grid = (triton.cdiv(count, tile.weights), triton.cdiv(rows, tile.inputs))
        _coded_product[grid](
            flat,
            weight.codes.contiguous().view(torch.int16),
            weight.scales.contiguous(),
            out,
            rows,
            count,
            columns,
            BITS=layout.bits,
            FRACTION=layout.fraction,
            MIN_EXPONENT=layout.min_exponent,
            WEIGHTS=tile.weights,
            INPUTS=tile.inputs,
            COLUMNS=COLUMNS,
            DTYPE=tl.bfloat16 if x.is_cuda else tl.float32,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return out.view(*x.shape[:-1], count)
