"""Exponents of power-of-two scales, computed from the maxima of blocks.

An E8M0 byte b stands for 2^(b - 127) (OCP Microscaling v1.0, section 5.4.1); 255 is NaN. Exponents are read from the
exponent bits of the maximum, never from a floating-point logarithm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mxrot.formats.element import Element, binary_exponents, powers_of_two

E8M0_BIAS = 127
E8M0_MIN, E8M0_MAX = -127, 127
E8M0_MAX_BYTE = E8M0_MAX + E8M0_BIAS


def block_maxima(blocks: Tensor) -> Tensor:
    """max |x| over the last dimension; NaN if it holds a NaN."""
    return blocks.abs().amax(dim=-1)


def e8m0_bytes(exponents: Tensor, maxima: Tensor) -> Tensor:
    """The E8M0 bytes of integer exponents, saturating at 2^-127 and 2^127; NaN (255) if `maxima` is not finite."""
    clamped = exponents.clamp(E8M0_MIN, E8M0_MAX) + E8M0_BIAS
    return torch.where(maxima.isfinite(), clamped, 255).to(torch.uint8)


def floor_exponents(maxima: Tensor, element: Element) -> Tensor:
    """floor(log2 amax) - emax (OCP section 6.3)."""
    return binary_exponents(maxima) - element.max_exponent


def even_exponents(maxima: Tensor, element: Element) -> Tensor:
    """The exponent of amax rounded to the element's mantissa bits (half away from zero), minus emax.

    For E2M1 it is that of `floor`, plus one if the mantissa of amax is at least 1.75.
    """
    exponents, mantissas = _split(maxima)
    rounds_to_two = mantissas >= 2 - 2.0 ** -(element.mantissa_bits + 1)
    return exponents - element.max_exponent + rounds_to_two.to(exponents.dtype)


def ceil_exponents(maxima: Tensor, element: Element) -> Tensor:
    """ceil(log2(amax / max)): the smallest exponent at which nothing saturates."""
    exponents, mantissas = _split(maxima)
    exceeds_max = mantissas > math.ldexp(element.max, -element.max_exponent)
    return exponents - element.max_exponent + exceeds_max.to(exponents.dtype)


def seven_and_a_quarter_exponents(maxima: Tensor, element: Element) -> Tensor:
    """ceil(log2(amax / 7.25)) for E2M1, AutoRound's rule: maxima between 6 and 7.25 saturate at 6."""
    exponents, mantissas = _split(maxima)
    return exponents - element.max_exponent + (mantissas > 7.25 / 4).to(exponents.dtype)


def _split(maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents e and mantissas m with maxima = m 2^e, exact; m is in [1, 2) unless the E8M0 byte saturates."""
    exponents = binary_exponents(maxima)
    return exponents, maxima * powers_of_two(-exponents.clamp(E8M0_MIN, E8M0_MAX)).to(maxima.dtype)


def third_exponents(maxima: Tensor, element: Element) -> Tensor:
    """floor(log2 amax), for scales that are divided by 3: amax lands in [max / 2, max) of E2M1 (FP-Quant,
    arXiv 2509.23202)."""
    return binary_exponents(maxima)


def least_error_exponents(blocks: Tensor, middle: Tensor, element: Element) -> Tensor:
    """The exponent among e-1, e, e+1, with e in `middle`, of least squared error; the smallest in a tie."""
    candidates = torch.stack([middle - 1, middle, middle + 1]).clamp(E8M0_MIN, E8M0_MAX)
    # Errors are in units of 2^middle. Otherwise the squares of very small or large blocks would vanish or overflow.
    unit = candidates[1]
    relative = blocks / powers_of_two(unit).to(blocks.dtype)[..., None]
    errors = torch.stack([_squared_error(relative, exponents - unit, element) for exponents in candidates])
    return candidates.gather(0, errors.argmin(dim=0, keepdim=True)).squeeze(0)


def _squared_error(blocks: Tensor, exponents: Tensor, element: Element) -> Tensor:
    scale = powers_of_two(exponents).to(blocks.dtype)[..., None]
    return (element.round(blocks / scale).mul_(scale).sub_(blocks)).square_().sum(dim=-1)
