"""Element types: the meaning of one code of a block, and how a real number becomes a code.

A code is a small unsigned integer held in uint8. For a floating-point element it is sign << (bits - 1) | magnitude, and
magnitudes are ordered like the values they stand for. For an integer element it is the two's complement of the integer,
masked to `bits`.

Encoding rounds to nearest, ties to the even code, and saturates at the largest finite value (OCP Microscaling v1.0,
section 5.3). The sign of -0.0 is kept if the element has one. Both float32 and float64 inputs are rounded once, from
their exact values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

_FLOAT_LAYOUT = {
    torch.float32: (torch.int32, 23, 0xFF, 127),
    torch.float64: (torch.int64, 52, 0x7FF, 1023),
}


def binary_exponents(x: Tensor) -> Tensor:
    """floor(log2 |x|), read from the exponent bits of float32 or float64 `x`; integer, same shape.

    Zeros and subnormals give the exponent below that of the smallest normal number (-127 or -1023). Inf and NaN give
    the one above that of the largest (128 or 1024).
    """
    integer, mantissa_bits, mask, bias = _FLOAT_LAYOUT[x.dtype]
    return ((x.view(integer) >> mantissa_bits) & mask) - bias


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^e as float32 for integer e in [-127, 127]; exact (2^-127 is a subnormal number)."""
    e = exponents.to(torch.int32)
    bits = torch.where(e > -127, (e + 127) << 23, torch.full_like(e, 1 << 22))
    return bits.view(torch.float32)


def look_up(values: tuple[Any, ...], indices: Tensor, dtype: torch.dtype) -> Tensor:
    """values[i] for uint8 `indices`, in `dtype`; same shape."""
    return _table(values, dtype, indices.device).take(indices.to(torch.int64))


def look_up_pairs(pairs: tuple[tuple[float, float], ...], indices: Tensor) -> Tensor:
    """Both values of pairs[i] for uint8 `indices` [..., n], side by side: float32 [..., 2 n]."""
    as_words = _table(pairs, torch.float32, indices.device).view(torch.int64).flatten()
    return as_words.take(indices.to(torch.int64)).view(torch.float32)


@lru_cache(maxsize=256)
def _table(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A lookup table, cached: making one on a GPU waits for all work before it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


@dataclass(frozen=True)
class Element(ABC):
    """How one code of a block is read and written. It holds no tensor."""

    name: str
    """The name in the OCP spelling, in lower case."""
    bits: int
    """The bits of a code, sign included."""

    @property
    @abstractmethod
    def max(self) -> float:
        """The largest finite magnitude."""

    @property
    @abstractmethod
    def mantissa_bits(self) -> int:
        """The bits after the leading one in the largest values. The `even` scale rule rounds to them."""

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)), the emax of OCP section 6.3."""
        return math.frexp(self.max)[1] - 1

    @abstractmethod
    def round(self, y: Tensor) -> Tensor:
        """The nearest values of float32/float64 `y`, same dtype and shape. Inf saturates, NaN stays NaN."""

    @abstractmethod
    def encode(self, y: Tensor) -> Tensor:
        """The uint8 codes of float32/float64 `y`, same shape. Inf saturates; the code of NaN is meaningless."""

    @abstractmethod
    def decode_scalar(self, code: int) -> float:
        """The value of one code; NaN or Inf if the element has such codes."""

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of every code, in code order."""
        return tuple(self.decode_scalar(code) for code in range(1 << self.bits))

    @property
    def is_signed(self) -> bool:
        return min(self.values) < 0

    @cached_property
    def largest_value(self) -> float:
        """The largest finite magnitude of any code, including the most negative code of an integer."""
        return max(abs(value) for value in self.values if math.isfinite(value))

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of uint8 `codes` in `dtype`, same shape."""
        return look_up(self.values, codes, dtype)

    @cached_property
    def value_pairs(self) -> tuple[tuple[float, float], ...]:
        """For 4-bit elements: the values of the low and the high nibble of every byte."""
        return tuple((self.values[byte & 15], self.values[byte >> 4]) for byte in range(256))


@dataclass(frozen=True)
class FloatElement(Element):
    """A small IEEE-like float with subnormals: sign, `exponent_bits`, `fraction_bits`."""

    exponent_bits: int
    fraction_bits: int
    bias: int
    """The exponent of a normal number is its exponent field minus this bias."""
    top_codes: tuple[float, ...] = ()
    """The values of the topmost magnitude codes if these are not numbers, lowest code first."""

    @property
    def mantissa_bits(self) -> int:
        return self.fraction_bits

    @property
    def max_code(self) -> int:
        """The magnitude code of the largest finite value."""
        return (1 << (self.bits - 1)) - 1 - len(self.top_codes)

    @property
    def max(self) -> float:
        return self._magnitude(self.max_code)

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal number."""
        return 1 - self.bias

    def _magnitude(self, code: int) -> float:
        field, fraction = code >> self.fraction_bits, code & ((1 << self.fraction_bits) - 1)
        if field == 0:
            return math.ldexp(fraction, self.min_exponent - self.fraction_bits)
        return math.ldexp((1 << self.fraction_bits) + fraction, field - self.bias - self.fraction_bits)

    def decode_scalar(self, code: int) -> float:
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        if magnitude > self.max_code:
            return sign * self.top_codes[magnitude - self.max_code - 1]
        return sign * self._magnitude(magnitude)

    def _steps(self, y: Tensor) -> Tensor:
        """The distance between neighbouring values around `y`, a power of two; same dtype and shape."""
        integer, mantissa_bits, mask, _ = _FLOAT_LAYOUT[y.dtype]
        binade = (y.view(integer) & (mask << mantissa_bits)).view(y.dtype)
        smallest_normal = math.ldexp(1.0, self.min_exponent)
        return binade.clamp(min=smallest_normal).mul_(math.ldexp(1.0, -self.fraction_bits))

    def round(self, y: Tensor) -> Tensor:
        # Saturating first gives the same value, and avoids Inf / Inf.
        y = y.clamp(-self.max, self.max)
        step = self._steps(y)
        return y.div_(step).round_().mul_(step)

    def round_half_away(self, y: Tensor) -> Tensor:
        """Like `round`, but ties go to the value farther from 0. The sign of a zero stays."""
        magnitude = y.abs().clamp_(max=self.max)
        step = self._steps(magnitude)
        multiples = magnitude.div_(step)
        whole = multiples.floor()
        rest = multiples.sub_(whole)  # exact; adding a half would not be
        return whole.add_(rest >= 0.5).mul_(step).copysign_(y)

    def encode(self, y: Tensor) -> Tensor:
        y = y.clamp(-self.max, self.max)
        exponents = binary_exponents(y).clamp(min=self.min_exponent)
        # In units of the step, a normal number lies in [2^f, 2^(f+1)]. At the upper end it carries into the exponent.
        multiples = (y.abs() / self._steps(y)).round().to(exponents.dtype)
        magnitude = ((exponents - self.min_exponent) << self.fraction_bits) + multiples
        negative = torch.signbit(y).to(exponents.dtype)
        return (magnitude | (negative << (self.bits - 1))).to(torch.uint8)


@dataclass(frozen=True)
class IntElement(Element):
    """Two's complement integers times a fixed power-of-two step, or unsigned integers.

    The most negative code of a signed element is never written, so the range is symmetric (OCP section 5.3.4 allows
    that). It can still be decoded.
    """

    step_exponent: int = 0
    """A code counts steps of 2^step_exponent."""
    signed: bool = True

    @property
    def max_code(self) -> int:
        return (1 << (self.bits - self.signed)) - 1

    @property
    def mantissa_bits(self) -> int:
        return self.max_code.bit_length() - 1

    @property
    def max(self) -> float:
        return math.ldexp(self.max_code, self.step_exponent)

    def decode_scalar(self, code: int) -> float:
        wraps = self.signed and code >> (self.bits - 1)
        return math.ldexp(code - (1 << self.bits) if wraps else code, self.step_exponent)

    def round(self, y: Tensor) -> Tensor:
        step = math.ldexp(1.0, self.step_exponent)
        low = -self.max if self.signed else 0.0
        # Two's complement has a single zero: adding 0 turns -0 into it.
        return (y / step).round_().mul_(step).clamp_(low, self.max).add_(0.0)

    def encode(self, y: Tensor) -> Tensor:
        steps = (self.round(y) / math.ldexp(1.0, self.step_exponent)).to(torch.int32)
        return (steps & ((1 << self.bits) - 1)).to(torch.uint8)


E2M1 = FloatElement("e2m1", bits=4, exponent_bits=2, fraction_bits=1, bias=1)
E2M3 = FloatElement("e2m3", bits=6, exponent_bits=2, fraction_bits=3, bias=1)
E3M2 = FloatElement("e3m2", bits=6, exponent_bits=3, fraction_bits=2, bias=3)
E4M3 = FloatElement("e4m3", bits=8, exponent_bits=4, fraction_bits=3, bias=7, top_codes=(math.nan,))
E5M2 = FloatElement(
    "e5m2",
    bits=8,
    exponent_bits=5,
    fraction_bits=2,
    bias=15,
    top_codes=(math.inf, math.nan, math.nan, math.nan),
)
INT8 = IntElement("int8", bits=8, step_exponent=-6)
INT4 = IntElement("int4", bits=4)
UINT4 = IntElement("uint4", bits=4, signed=False)
UINT2 = IntElement("uint2", bits=2, signed=False)
