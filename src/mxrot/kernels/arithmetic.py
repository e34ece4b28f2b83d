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
def round_to_element(scaled, smallest_normal, fraction_step, largest):
    """float32 to the nearest element of a floating-point format, ties to even, beyond `largest` to that."""
    magnitude = tl.minimum(tl.abs(scaled), largest)
    binade = (magnitude.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(binade, smallest_normal) * fraction_step
    # Adding and taking away 2^23 rounds to an integer, ties to even.
    rounded = ((magnitude * inverse_power_of_two(step) + 8388608.0) - 8388608.0) * step
    sign = scaled.to(tl.int32, bitcast=True) & -0x80000000
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
