"""Rounding in Triton, as kernels share it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(exponents):
    """2^e in float32 for int32 e from -127 to 127."""
    return tl.where(exponents > -127, (exponents + 127) << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power_of_two(powers):
    """1 / 2^e in float32, for 2^e from 2^-126 to 2^126; by bits, because a division need not be exact."""
    return ((254 << 23) - powers.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def to_grid(magnitude, smallest_normal, fraction_bits):
    """A magnitude in float32 plus a power of two, which rounds it to an element's grid, ties to even; and that power.

    The power is 2^23 steps of the grid there, so the low bits of the sum count steps.
    """
    binade = tl.maximum(magnitude, smallest_normal).to(tl.int32, bitcast=True) & 0x7F800000
    power = (binade + ((23 - fraction_bits) << 23)).to(tl.float32, bitcast=True)
    return magnitude + power, power


@triton.jit
def round_to_element(scaled, smallest_normal, fraction_bits, largest):
    """float32 to the nearest element of a floating-point format, ties to even, beyond `largest` to that."""
    raised, power = to_grid(tl.minimum(tl.abs(scaled), largest), smallest_normal, fraction_bits)
    sign = scaled.to(tl.int32, bitcast=True) & -0x80000000
    return ((raised - power).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
