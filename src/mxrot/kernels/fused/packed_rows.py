"""Rows of 2-, 4- and 8-bit codes as the kernels of the cache read and write them (Triton).

A row is read as units of 8 or 16 bits, each of 1 or 4 codes, and its numbers stand in an order of their own: first
those of the first place of every unit, then those of the second. Sums over columns do not care, and what is written
goes to `columns_of`.

Numbers of floating-point elements are made by moving the bits of a code to where a bfloat16 or float32 number has
them: that is the value times a power of two, and one product puts it right and applies the scale. For that power to fit
into one factor, numbers here are 2^-60 of what they stand for, of scales from 2^-60 to 2^60; others count as these.
Integers less their zero point are exact; where a row has one scale it is applied to sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from mxrot.formats import RULES, TensorQuantizer, Uniform
from mxrot.formats.block_scales import E8M0, FP16_SCALE
from mxrot.formats.element import FloatElement, IntElement
from mxrot.kernels.fused.arithmetic import power_of_field, round_to_element

_INTEGER = -1
"""In place of the bits of fraction."""


@dataclass(frozen=True)
class RowLayout:
    """What kernels need to know of a format, a rule and a width."""

    bits: int
    groups: int
    fraction: int
    """Bits of fraction of a floating-point element; `_INTEGER` for an unsigned integer with a zero point."""
    min_exponent: int
    max_exponent: int
    largest: float
    raises_from: int
    """Of the rule, as `ScaleRule.raises_from` has it for float32."""
    clip: float

    @staticmethod
    def of(quantizer: TensorQuantizer, width: int) -> RowLayout | None:
        """None for what the kernels do not know."""
        format, rule = quantizer.format, quantizer.rule
        if not isinstance(format.grid, Uniform) or width % format.block_in(width):
            return None
        element, groups = format.element, width // format.block_in(width)
        raises_from = RULES[rule.name].raises_from
        if isinstance(element, FloatElement) and element.bits in (4, 8) and format.scale == E8M0 and raises_from:
            return RowLayout(
                element.bits,
                groups,
                element.fraction_bits,
                element.min_exponent,
                element.max_exponent,
                element.max,
                raises_from(element),
                rule.clip,
            )
        is_unsigned = isinstance(element, IntElement) and not element.is_signed and format.scale == FP16_SCALE
        if is_unsigned and rule.name == "minmax" and element.bits in (2, 4):
            return RowLayout(element.bits, groups, _INTEGER, 0, 0, element.max, 0, rule.clip)
        return None

    @property
    def is_integer(self) -> bool:
        return self.fraction == _INTEGER

    @property
    def unit_bytes(self) -> int:
        """Of a unit."""
        return 2 if self.bits == 4 else 1

    def reading(self, prefix: str) -> dict[str, int]:
        """Constants of a kernel that reads."""
        return {
            f"{prefix}_BITS": self.bits,
            f"{prefix}_GROUPS": self.groups,
            f"{prefix}_FRACTION": self.fraction,
            f"{prefix}_MIN_EXPONENT": self.min_exponent,
        }

    def writing(self, prefix: str) -> dict[str, int | float]:
        """Constants of a kernel that writes."""
        return self.reading(prefix) | {
            f"{prefix}_MAX_EXPONENT": self.max_exponent,
            f"{prefix}_LARGEST": self.largest,
            f"{prefix}_RAISES_FROM": self.raises_from,
            f"{prefix}_CLIP": self.clip,
        }


@triton.jit
def columns_of(WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Which columns the numbers of a row are, in the order in which `numbers_of` gives them."""
    place = tl.arange(0, WIDTH)
    if BITS == 8:
        return place
    else:
        return place % (WIDTH // 4) * 4 + place // (WIDTH // 4)


@triton.jit
def spread(x, WIDTH: tl.constexpr):
    """[N, WIDTH] of one entry a group, [N, G]."""
    N: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1]
    if G == 1:
        return tl.broadcast_to(x, [N, WIDTH])
    else:
        return tl.reshape(tl.broadcast_to(x[:, :, None], [N, G, WIDTH // G]), [N, WIDTH])


@triton.jit
def _e2m1_pairs(units, factors, PLACE: tl.constexpr):
    """bfloat16 numbers of the E2M1 codes at a place of 16-bit units, two units at a time.

    lop3 0xEA is (a & b) | c. The product is a sum with -0, which any device has of two numbers at a time.
    """
    if PLACE == 0:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, m, z; shl.b32 s, $1, 12; shl.b32 m, $1, 6; and.b32 m, m, 0x01C001C0; "
            "lop3.b32 m, s, 0x80008000, m, 0xEA; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, m, $2, z; }",
            "=r,r,r",
            [units, factors],
            tl.bfloat16,
            True,
            2,
        )
    elif PLACE == 1:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, m, z; shl.b32 s, $1, 8; shl.b32 m, $1, 2; and.b32 m, m, 0x01C001C0; "
            "lop3.b32 m, s, 0x80008000, m, 0xEA; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, m, $2, z; }",
            "=r,r,r",
            [units, factors],
            tl.bfloat16,
            True,
            2,
        )
    elif PLACE == 2:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, m, z; shl.b32 s, $1, 4; shr.u32 m, $1, 2; and.b32 m, m, 0x01C001C0; "
            "lop3.b32 m, s, 0x80008000, m, 0xEA; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, m, $2, z; }",
            "=r,r,r",
            [units, factors],
            tl.bfloat16,
            True,
            2,
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m, z; shr.u32 m, $1, 6; and.b32 m, m, 0x01C001C0; "
            "lop3.b32 m, $1, 0x80008000, m, 0xEA; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, m, $2, z; }",
            "=r,r,r",
            [units, factors],
            tl.bfloat16,
            True,
            2,
        )


@triton.jit
def _float_numbers(codes, factors, BITS: tl.constexpr, FRACTION: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers of floating-point codes in int32, with float32 factors."""
    SIGN: tl.constexpr = 1 << (BITS - 1)
    bits = ((codes & (SIGN - 1)) << (23 - FRACTION)) | ((codes & SIGN) << (32 - BITS))
    return (bits.to(tl.float32, bitcast=True) * factors).to(DTYPE)


@triton.jit
def _at_place(
    units,
    factors,
    zeros,
    PLACE: tl.constexpr,
    BITS: tl.constexpr,
    FRACTION: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Numbers [N, W] of the codes at a place of units [N, W]."""
    if FRACTION == 1 and BITS == 4 and tl.bfloat16 == DTYPE:
        return _e2m1_pairs(units, factors, PLACE)
    else:
        codes = (units.to(tl.int32) >> (BITS * PLACE)) & ((1 << BITS) - 1)
        if FRACTION >= 0:
            return _float_numbers(codes, factors, BITS, FRACTION, DTYPE)
        elif SCALED:
            return ((codes.to(tl.float32) - zeros) * factors).to(DTYPE)
        else:
            return (codes.to(tl.float32) - zeros).to(DTYPE)


@triton.jit
def numbers_of(
    units,
    scales,
    zeros,
    BITS: tl.constexpr,
    FRACTION: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Numbers [N, D] of units [N, W], with scales and zero points [N, G] as they are stored.

    Those of floating-point elements are 2^-60 of what they stand for; of integers with one scale a row without it.
    """
    N: tl.constexpr = units.shape[0]
    W: tl.constexpr = units.shape[1]
    SCALED: tl.constexpr = scales.shape[1] > 1
    if FRACTION >= 0:
        fields = tl.minimum(tl.maximum(scales.to(tl.int32) + (66 + MIN_EXPONENT), 1), 254) << 23
        found = tl.where(scales.to(tl.int32) == 255, float("nan"), fields.to(tl.float32, bitcast=True))
        if FRACTION == 1 and BITS == 4:
            found = found.to(DTYPE)
        factors = spread(found, W)
        shifts = factors
    else:
        shifts = spread(zeros.to(tl.float32), W)
        factors = spread(scales.to(tl.float32), W) if SCALED else shifts
    if BITS == 8:
        return _at_place(units, factors, shifts, 0, BITS, FRACTION, SCALED, DTYPE)
    else:
        first = _at_place(units, factors, shifts, 0, BITS, FRACTION, SCALED, DTYPE)
        second = _at_place(units, factors, shifts, 1, BITS, FRACTION, SCALED, DTYPE)
        third = _at_place(units, factors, shifts, 2, BITS, FRACTION, SCALED, DTYPE)
        fourth = _at_place(units, factors, shifts, 3, BITS, FRACTION, SCALED, DTYPE)
        joined = tl.join(tl.join(first, second), tl.join(third, fourth))
        return tl.reshape(tl.permute(joined, [0, 3, 2, 1]), [N, 4 * W])


@triton.jit
def store_row(
    x,
    codes_pointer,
    scale_pointer,
    zero_pointer,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    FRACTION: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,
    RAISES_FROM: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Quantize float32 x [WIDTH] as `formats.quantize` does, and write its bytes and what stands beside them.

    A block that holds NaN or Inf gets the scale NaN.
    """
    blocks = tl.reshape(x, [GROUPS, WIDTH // GROUPS])
    group = tl.arange(0, GROUPS)
    # As integers the bits of magnitudes are ordered like these, with NaN on top.
    bits = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    is_finite = bits < 0x7F800000
    blocks = tl.where(is_finite[:, None], blocks, 0.0)
    bits = tl.where(is_finite, bits, 0)
    if FRACTION >= 0:
        if CLIP != 1:
            bits = (bits.to(tl.float32, bitcast=True) * CLIP).to(tl.int32, bitcast=True)
        fields = ((bits + (0x800000 - RAISES_FROM)) & 0x7F800000) - (MAX_EXPONENT << 23)
        fields = tl.maximum(fields, 0)
        scaled = blocks * power_of_field((254 << 23) - fields)[:, None]
        codes = _float_codes(scaled, BITS, FRACTION, MIN_EXPONENT, LARGEST)
        tl.store(scale_pointer + group, tl.where(is_finite, fields >> 23, 255).to(tl.uint8))
    else:
        low, high = tl.minimum(tl.min(blocks, axis=1), 0.0), tl.maximum(tl.max(blocks, axis=1), 0.0)
        if CLIP != 1:
            low, high = low * CLIP, high * CLIP
        stored = tl.math.div_rn(high - low, tl.full([GROUPS], LARGEST, tl.float32)).to(tl.float16)
        scale = stored.to(tl.float32)
        zero = _to_integer(tl.math.div_rn(0.0 - low, tl.where(scale > 0, scale, 1.0)), LARGEST)
        zero = tl.where(scale < float("inf"), zero, 0.0)
        divisor = tl.broadcast_to(tl.where(scale > 0, scale, 1.0)[:, None], [GROUPS, WIDTH // GROUPS])
        scaled = tl.where(scale[:, None] > 0, tl.math.div_rn(blocks, divisor), 0.0) + zero[:, None]
        codes = _to_integer(scaled, LARGEST).to(tl.int32)
        tl.store(scale_pointer + group, tl.where(is_finite, stored, float("nan")))
        tl.store(zero_pointer + group, zero.to(tl.uint8))
    EACH: tl.constexpr = 8 // BITS
    codes = tl.reshape(codes, [WIDTH // EACH, EACH])
    packed = tl.sum(codes << (BITS * tl.arange(0, EACH))[None, :], axis=1)
    tl.store(codes_pointer + tl.arange(0, WIDTH // EACH), packed.to(tl.uint8))


@triton.jit
def _to_integer(x, LARGEST: tl.constexpr):
    """To the nearest integer from 0 to LARGEST, ties to even; float32."""
    return (tl.minimum(tl.maximum(x, 0.0), LARGEST) + 8388608.0) - 8388608.0


@triton.jit
def _float_codes(scaled, BITS: tl.constexpr, FRACTION: tl.constexpr, MIN_EXPONENT: tl.constexpr, LARGEST: tl.constexpr):
    """Codes in int32 of the nearest floating-point elements."""
    rounded = round_to_element(scaled, 2.0**MIN_EXPONENT, FRACTION, LARGEST)
    bits = rounded.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude >> (23 - FRACTION)) - ((126 + MIN_EXPONENT) << FRACTION)
    # Below the smallest normal number a code counts steps.
    steps = (tl.abs(rounded) * 2.0 ** (FRACTION - MIN_EXPONENT)).to(tl.int32)
    codes = tl.where(magnitude >= ((127 + MIN_EXPONENT) << 23), normal, steps)
    return codes | ((bits >> (32 - BITS)) & (1 << (BITS - 1)))
