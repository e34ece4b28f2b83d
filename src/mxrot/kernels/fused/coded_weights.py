"""A few rows of bfloat16 times MXINT8, MXFP8 or MXFP4 weights in codes (Triton).

In generation the head is read once for a few rows, so its size limits the speed. A program processes a few rows of the
weight along all of K, and decodes codes in registers, two with a few instructions (packed_rows.py). They are the first
operand of the product. The inputs, which all programs share and the L2 cache holds, are the second. Codes are decoded
in a special order, and the inputs are put in the same order. Both are copied to shared memory some steps ahead. A
vocabulary has enough rows of weights for the programs of any device, so K is not split.

Every code's number times its scale is a bfloat16 number, so products are exact. Sums are float32, in an order that
depends on the tile. `plain.plain_coded_product` is the specification up to that order. Rows of weights with the scale
NaN give NaN. With floating-point elements, so do rows with a scale above 2^60, and blocks with scales below 2^-60 lose
bits. Integers: the lower seven bits of a code become the last bits of a number from 128 to 255. 128 is subtracted from
it, or 256 if the code is negative. A scale below 2^-120 counts as 2^-120. Triton's interpreter has no bfloat16
products, so both operands are float32 there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.formats import Format, TensorQuantizer, get_format
from mxrot.kernels.fused.arithmetic import product
from mxrot.kernels.fused.packed_rows import RowLayout, are_in_range, numbers_of, spread
from mxrot.kernels.plain.coded_weights import BLOCK, CodedWeight

COLUMNS = 128
"""Columns of K at one time."""
_INTEGER = -1
"""Replaces the number of fraction bits for integers."""


@dataclass(frozen=True)
class Tile:
    """The size of a program's work."""

    weights: int
    """Rows of the weight."""
    inputs: int
    """Rows of the inputs."""
    warps: int
    stages: int


FIXED = Tile(64, 16, 4, 3)
"""The tile if a row must not depend on other rows."""


def tile_for(rows: int) -> Tile:
    """The tile for `rows` rows of inputs. Up to 128, one program handles all of them, so that codes are decoded
    once."""
    if rows <= 16:
        return FIXED
    return Tile(64, 32, 4, 3) if rows <= 32 else Tile(64, 64, 4, 3) if rows <= 64 else Tile(64, 128, 8, 3)


def _decoder(moved: str) -> tl.constexpr:
    """Assembly that converts one code of each of two 16-bit units ($1), with the factor of their block twice ($2), to
    two bfloat16 numbers. `moved` moves the code to the lower byte of its half. lop3 0xEA is (a & b) | c."""
    return tl.constexpr(
        f"""{{
        .reg .b32 code, number, start, one, zero;
        {moved}
        lop3.b32 number, code, 0x007F007F, 0x43004300, 0xEA;
        lop3.b32 start, code, 0x00800080, 0xC300C300, 0xEA;
        mov.b32 one, 0x3F803F80;
        mov.b32 zero, 0x80008000;
        fma.rn.bf16x2 number, number, one, start;
        fma.rn.bf16x2 $0, number, $2, zero;
        }}"""
    )


_LOWER = _decoder("mov.b32 code, $1;")
_UPPER = _decoder("shr.u32 code, $1, 8;")


@triton.jit
def _integers(units, scales, DTYPE: tl.constexpr):
    """Numbers [N, 2 W] of two's complement codes in units [N, W], in the order of `numbers_of`, with scales [N, G]."""
    N: tl.constexpr = units.shape[0]
    W: tl.constexpr = units.shape[1]
    fields = tl.maximum(scales.to(tl.int32), 7) - 6  # a code counts steps of 2^-6
    if tl.bfloat16 == DTYPE:
        factors = spread((fields << 7).to(tl.int16).to(tl.bfloat16, bitcast=True), W)
        first = tl.inline_asm_elementwise(_LOWER, "=r,r,r", [units, factors], tl.bfloat16, True, 2)
        second = tl.inline_asm_elementwise(_UPPER, "=r,r,r", [units, factors], tl.bfloat16, True, 2)
    else:
        factors = spread((fields << 23).to(tl.float32, bitcast=True), W)
        lower, upper = units.to(tl.int32) & 255, (units.to(tl.int32) >> 8) & 255
        first = (lower - 2 * (lower & 128)).to(tl.float32) * factors
        second = (upper - 2 * (upper & 128)).to(tl.float32) * factors
    return tl.reshape(tl.permute(tl.join(first, second), [0, 2, 1]), [N, 2 * W])


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
    column = tl.arange(0, COLUMNS)
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
            x_pointer + row[:, None] * columns_in_all + own_column[None, :],
            mask=(row < rows_in_all)[:, None] & (own_column < columns_in_all)[None, :],
            other=0.0,
        )
        x = tl.reshape(tl.permute(tl.reshape(x, [INPUTS, UNITS, COLUMNS // UNITS]), [0, 2, 1]), [INPUTS, COLUMNS])
        if FRACTION >= 0:
            numbers = numbers_of(units, scales, None, BITS, FRACTION, MIN_EXPONENT, DTYPE)
            in_range = in_range & are_in_range(scales, FRACTION).to(tl.int32)
        else:
            numbers = _integers(units, scales, DTYPE)
            in_range = in_range & (tl.max(scales.to(tl.int32), axis=1) < 255).to(tl.int32)
        total = product(numbers, tl.trans(x.to(DTYPE)), total, 1, DTYPE)
    if FRACTION >= 0:
        total = total * 2.0**60
    total = tl.where((in_range > 0)[:, None], total, float("nan"))
    place = row[None, :] * weights_in_all + weight[:, None]
    inside = (row < rows_in_all)[None, :] & (weight < weights_in_all)[:, None]
    tl.store(out_pointer + place, total.to(out_pointer.dtype.element_ty), mask=inside)


def codes_of(format: Format) -> tuple[int, int, int] | None:
    """Bits of a code, bits of fraction and the smallest exponent. None for a format that the kernel does not read."""
    if format == get_format("mxint8"):
        return 8, _INTEGER, 0
    if format.block != BLOCK or format.bits not in (4, 8) or "even" not in format.rules:
        return None
    found = RowLayout.of(TensorQuantizer(format, format.rule("even")), BLOCK)
    return None if found is None or found.is_integer else (found.bits, found.fraction, found.min_exponent)


def coded_product(x: Tensor, weight: CodedWeight, dtype: torch.dtype, is_fixed: bool = False) -> Tensor:
    """The product `dtype` [..., N] for bfloat16 x [..., K]. With `is_fixed`, a row has the bits that it has alone.

    For formats that `codes_of` supports.
    """
    read = codes_of(weight.format)
    assert read is not None and x.dtype == torch.bfloat16
    bits, fraction, min_exponent = read
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
            BITS=bits,
            FRACTION=fraction,
            MIN_EXPONENT=min_exponent,
            WEIGHTS=tile.weights,
            INPUTS=tile.inputs,
            COLUMNS=COLUMNS,
            DTYPE=tl.bfloat16 if x.is_cuda else tl.float32,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return out.view(*x.shape[:-1], count)
