"""Rounding in Triton, shared by kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_field(field):
    """2^e in float32 for int32 (e + 127) << 23, e from -127 to 127."""
    return tl.maximum(field, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponents):
    """2^e in float32 for int32 e from -127 to 127."""
    return power_of_field((exponents + 127) << 23)


@triton.jit
def inverse_power_of_two(powers):
    """1 / 2^e in float32, for 2^e from 2^-126 to 2^126. It is computed from the bits, because division may be
    inexact."""
    return ((254 << 23) - powers.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def round_to_element(scaled, smallest_normal, fraction_bits, largest):
    """Round float32 to the nearest element of a floating-point format, ties to even. Values beyond `largest` become
    `largest`."""
    magnitude = tl.minimum(tl.abs(scaled), largest)
    binade = tl.maximum(magnitude, smallest_normal).to(tl.int32, bitcast=True) & 0x7F800000
    # 2^23 steps of the grid: near this number, float32 has no fractions of a step.
    power = binade.to(tl.float32, bitcast=True) * power_of_two(23 - fraction_bits)
    rounded = (magnitude + power) - power
    sign = scaled.to(tl.int32, bitcast=True) & -0x80000000
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, total, DTYPE: tl.constexpr):
    if tl.float32 == DTYPE:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def product(x, y, total, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """total + x y. float32 y is split into PARTS numbers of DTYPE, and x has this type."""
    first = y.to(DTYPE)
    total = _dot(x, first, total, DTYPE)
    if PARTS == 2:
        total = _dot(x, (y - first.to(tl.float32)).to(DTYPE), total, DTYPE)
    return total
