"""Rows of 2-, 4- and 8-bit codes as the kernels of the cache read and write them (Triton).

A row is read as 16-bit units, each of 2, 4 or 8 codes. Its numbers are in a special order: first those at the first
place of every unit, then those at the second, and so on. Sums over columns do not depend on the order, and results are
written to `columns_of`. Two units are decoded at a time, into two bfloat16 numbers, by three to five instructions.

Numbers of floating-point elements are made by moving the bits of a code to the places that they have in bfloat16 or
float32. This gives the value times a power of two, and one product corrects it and applies the scale. For the power to
fit into one factor, numbers here are 2^-60 times their values. A row with a scale above 2^60, or NaN, counts as NaN.
Below 2^-60 numbers lose bits. Integers become the last bits of a number from 128 to 256. 128 and the zero point are
subtracted from it, all exactly. If a row has one scale, it is applied to sums. Triton's interpreter has no assembly, so
the numbers are float32 there.
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
"""Replaces the number of fraction bits for integers."""


@dataclass(frozen=True)
class RowLayout:
    """The facts about a format, a rule and a width that kernels need."""

    bits: int
    groups: int
    fraction: int
    """Fraction bits of a floating-point element. `_INTEGER` for an unsigned integer with a zero point."""
    min_exponent: int
    max_exponent: int
    largest: float
    raises_from: int
    """`ScaleRule.raises_from` of the rule, for float32."""
    clip: float

    @staticmethod
    def of(quantizer: TensorQuantizer, width: int) -> RowLayout | None:
        """The layout. None if the kernels do not support it."""
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

    def reading(self, prefix: str) -> dict[str, int]:
        """Constants of a kernel that reads rows."""
        return {
            f"{prefix}_BITS": self.bits,
            f"{prefix}_GROUPS": self.groups,
            f"{prefix}_FRACTION": self.fraction,
            f"{prefix}_MIN_EXPONENT": self.min_exponent,
        }

    def writing(self, prefix: str) -> dict[str, int | float]:
        """Constants of a kernel that writes rows."""
        return self.reading(prefix) | {
            f"{prefix}_MAX_EXPONENT": self.max_exponent,
            f"{prefix}_LARGEST": self.largest,
            f"{prefix}_RAISES_FROM": self.raises_from,
            f"{prefix}_CLIP": self.clip,
        }


@triton.jit
def columns_of(WIDTH: tl.constexpr, BITS: tl.constexpr):
    """The columns of the numbers of a row, in the order of `numbers_of`."""
    place, UNITS = tl.arange(0, WIDTH), WIDTH * BITS // 16
    return place % UNITS * (16 // BITS) + place // UNITS


@triton.jit
def spread(x, WIDTH: tl.constexpr):
    """[N, WIDTH] with one entry per group from [N, G]."""
    N: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1]
    if G == 1:
        return tl.broadcast_to(x, [N, WIDTH])
    else:
        return tl.reshape(tl.broadcast_to(x[:, :, None], [N, G, WIDTH // G]), [N, WIDTH])


@triton.constexpr_function
def _assembly(place: int, bits: int, fraction: int) -> str:
    """Converts the codes at a place of two units ($1) to two bfloat16 numbers. For floating-point elements, $2 is a
    factor of both. For integers, it is added to both, which are at least 128.

    lop3 0xEA is (a & b) | c. A product is a fused multiply-add with -0, which older devices have for two numbers at a
    time.
    """

    def moved(to: str, by: int) -> str:
        return f"shl.b32 {to}, $1, {by};" if by >= 0 else f"shr.u32 {to}, $1, {-by};"

    def twice(mask: int) -> str:
        return f"0x{mask << 16 | mask:08X}"

    if fraction < 0:
        number = moved("number", -bits * place)
        return (
            f"{{ .reg .b32 number, one; {number} lop3.b32 number, number, {twice((1 << bits) - 1)}, 0x43004300, 0xEA; "
            "mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, number, one, $2; }"
        )
    sign = moved("sign", 16 - bits * (place + 1))
    number = moved("number", 7 - fraction - bits * place)
    magnitude = twice(((1 << (bits - 1)) - 1) << (7 - fraction))
    return (
        f"{{ .reg .b32 sign, number, zero; {sign} {number} and.b32 number, number, {magnitude}; "
        "lop3.b32 number, sign, 0x80008000, number, 0xEA; mov.b32 zero, 0x80008000; "
        "fma.rn.bf16x2 $0, number, $2, zero; }"
    )


@triton.jit
def _at_place(
    units, factors, shifts, PLACE: tl.constexpr, BITS: tl.constexpr, FRACTION: tl.constexpr, DTYPE: tl.constexpr
):
    """Numbers [N, W] of the codes at a place of units [N, W]. Integers are not scaled if the factors are None."""
    if tl.bfloat16 == DTYPE:
        assembly: tl.constexpr = _assembly(PLACE, BITS, FRACTION)
        operand = factors if FRACTION >= 0 else shifts
        found = tl.inline_asm_elementwise(assembly, "=r,r,r", [units, operand], tl.bfloat16, True, 2)
        if FRACTION < 0 and factors is not None:
            found = (found.to(tl.float32) * factors).to(DTYPE)
        return found
    else:
        codes = (units.to(tl.int32) >> (BITS * PLACE)) & ((1 << BITS) - 1)
        if FRACTION >= 0:
            magnitude, sign = codes & ((1 << (BITS - 1)) - 1), codes & (1 << (BITS - 1))
            bits = (magnitude << (23 - FRACTION)) | (sign << (32 - BITS))
            return bits.to(tl.float32, bitcast=True) * factors
        elif factors is not None:
            return ((codes + 128).to(tl.float32) + shifts) * factors
        else:
            return (codes + 128).to(tl.float32) + shifts


@triton.jit
def _factors(scales, MIN_EXPONENT: tl.constexpr, DTYPE: tl.constexpr):
    """The factors for the bits of floating-point codes, with one instruction per scale. See `are_in_range`."""
    if tl.bfloat16 == DTYPE:
        return (scales.to(tl.int16) * 128 + (66 + MIN_EXPONENT) * 128).to(tl.bfloat16, bitcast=True)
    else:
        return ((scales.to(tl.int32) + (66 + MIN_EXPONENT)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _shifts(zeros, DTYPE: tl.constexpr):
    """-128 minus the zero points."""
    if tl.bfloat16 == DTYPE:
        return (zeros.to(tl.int16) | -0x3D00).to(tl.bfloat16, bitcast=True)
    else:
        return -128.0 - zeros.to(tl.float32)


@triton.jit
def are_in_range(scales, FRACTION: tl.constexpr):
    """Flags of the rows [N] if `numbers_of` can apply all of their scales. For other rows its result is undefined."""
    if FRACTION >= 0:
        return tl.max(scales.to(tl.int32), axis=1) < 188
    else:
        return tl.full([scales.shape[0]], True, tl.int1)


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
    """Numbers [N, D] of units [N, W], with stored scales and zero points [N, G].

    Floating-point elements give 2^-60 times their values. Integers with one scale per row are not scaled.
    """
    N: tl.constexpr = units.shape[0]
    W: tl.constexpr = units.shape[1]
    if FRACTION >= 0:
        found = _factors(scales, MIN_EXPONENT, DTYPE)
        factors = spread(found, W)
        shifts = None
    else:
        shifts = spread(_shifts(zeros, DTYPE), W)
        factors = spread(scales.to(tl.float32), W) if scales.shape[1] > 1 else None
    first = _at_place(units, factors, shifts, 0, BITS, FRACTION, DTYPE)
    second = _at_place(units, factors, shifts, 1, BITS, FRACTION, DTYPE)
    joined = tl.join(first, second)
    if BITS == 8:
        return tl.reshape(tl.permute(joined, [0, 2, 1]), [N, 2 * W])
    else:
        third = _at_place(units, factors, shifts, 2, BITS, FRACTION, DTYPE)
        fourth = _at_place(units, factors, shifts, 3, BITS, FRACTION, DTYPE)
        joined = tl.join(joined, tl.join(third, fourth))
        if BITS == 4:
            return tl.reshape(tl.permute(joined, [0, 3, 2, 1]), [N, 4 * W])
        else:
            fifth = _at_place(units, factors, shifts, 4, BITS, FRACTION, DTYPE)
            sixth = _at_place(units, factors, shifts, 5, BITS, FRACTION, DTYPE)
            seventh = _at_place(units, factors, shifts, 6, BITS, FRACTION, DTYPE)
            eighth = _at_place(units, factors, shifts, 7, BITS, FRACTION, DTYPE)
            others = tl.join(tl.join(fifth, sixth), tl.join(seventh, eighth))
            return tl.reshape(tl.permute(tl.join(joined, others), [0, 4, 3, 2, 1]), [N, 8 * W])


@triton.jit
def store_rows(
    x,
    codes_pointer,
    code_places,
    scale_pointer,
    zero_pointer,
    part_places,
    inside,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    FRACTION: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,
    RAISES_FROM: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Quantize float32 x [ROWS, WIDTH] as `formats.quantize` does. Write the codes and parts of the rows that are
    `inside`, from their places [ROWS] on.

    A block that holds NaN or Inf gets the scale NaN.
    """
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    BLOCK: tl.constexpr = WIDTH // GROUPS
    blocks = tl.reshape(x, [ROWS * GROUPS, BLOCK])
    part_places = part_places[:, None] + tl.arange(0, GROUPS)[None, :]
    # As integers, the bits of magnitudes have the same order, with NaN at the top.
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
        scales = tl.where(is_finite, fields >> 23, 255).to(tl.uint8)
    else:
        low, high = tl.minimum(tl.min(blocks, axis=1), 0.0), tl.maximum(tl.max(blocks, axis=1), 0.0)
        if CLIP != 1:
            low, high = low * CLIP, high * CLIP
        stored = tl.math.div_rn(high - low, tl.full([ROWS * GROUPS], LARGEST, tl.float32)).to(tl.float16)
        scale = stored.to(tl.float32)
        zero = _to_integer(tl.math.div_rn(0.0 - low, tl.where(scale > 0, scale, 1.0)), LARGEST)
        zero = tl.where(scale < float("inf"), zero, 0.0)
        divisor = tl.broadcast_to(tl.where(scale > 0, scale, 1.0)[:, None], [ROWS * GROUPS, BLOCK])
        scaled = tl.where(scale[:, None] > 0, tl.math.div_rn(blocks, divisor), 0.0) + zero[:, None]
        codes = _to_integer(scaled, LARGEST).to(tl.int32)
        scales = tl.where(is_finite, stored, float("nan"))
        zeros = tl.reshape(zero, [ROWS, GROUPS]).to(tl.uint8)
        tl.store(zero_pointer + part_places, zeros, mask=inside[:, None])
    tl.store(scale_pointer + part_places, tl.reshape(scales, [ROWS, GROUPS]), mask=inside[:, None])
    EACH: tl.constexpr = 8 // BITS
    codes = tl.reshape(codes, [ROWS, WIDTH // EACH, EACH])
    packed = tl.sum(codes << (BITS * tl.arange(0, EACH))[None, None, :], axis=2)
    place = code_places[:, None] + tl.arange(0, WIDTH // EACH)[None, :]
    tl.store(codes_pointer + place, packed.to(tl.uint8), mask=inside[:, None])


@triton.jit
def _to_integer(x, LARGEST: tl.constexpr):
    """Round to the nearest integer from 0 to LARGEST, ties to even; float32."""
    return (tl.minimum(tl.maximum(x, 0.0), LARGEST) + 8388608.0) - 8388608.0


@triton.jit
def _float_codes(scaled, BITS: tl.constexpr, FRACTION: tl.constexpr, MIN_EXPONENT: tl.constexpr, LARGEST: tl.constexpr):
    """Codes in int32 of the nearest floating-point elements."""
    rounded = round_to_element(scaled, 2.0**MIN_EXPONENT, FRACTION, LARGEST)
    bits = rounded.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude >> (23 - FRACTION)) - ((126 + MIN_EXPONENT) << FRACTION)
    # Below the smallest normal number, a code is a number of steps.
    steps = (tl.abs(rounded) * 2.0 ** (FRACTION - MIN_EXPONENT)).to(tl.int32)
    codes = tl.where(magnitude >= ((127 + MIN_EXPONENT) << 23), normal, steps)
    return codes | ((bits >> (32 - BITS)) & (1 << (BITS - 1)))
