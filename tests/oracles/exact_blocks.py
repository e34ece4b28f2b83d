"""Slow exact twin of the block formats: Fractions, one block at a time, written from the definitions."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

TWO = Fraction(2)


@dataclass(frozen=True)
class ExactElement:
    """Magnitudes by code, and what the `even` rule needs."""

    magnitudes: tuple[Fraction, ...]
    mantissa_bits: int
    has_negative_zero: bool = True

    @property
    def max(self) -> Fraction:
        return self.magnitudes[-1]

    @property
    def max_exponent(self) -> int:
        return floor_log2(self.max)


def _float_magnitudes(exponent_bits: int, fraction_bits: int, bias: int, largest: int) -> tuple[Fraction, ...]:
    """IEEE style: exponent field 0 has no leading one; the list ends at `largest`."""
    magnitudes = []
    for field in range(1 << exponent_bits):
        for fraction in range(1 << fraction_bits):
            leading = Fraction(fraction, 1 << fraction_bits) + (field > 0)
            magnitudes.append(leading * TWO ** (max(field, 1) - bias))
    return tuple(m for m in magnitudes if m <= largest)


ELEMENTS = {
    "e2m1": ExactElement(tuple(map(Fraction, ("0", "1/2", "1", "3/2", "2", "3", "4", "6"))), mantissa_bits=1),
    "e2m3": ExactElement(_float_magnitudes(2, 3, 1, 8), mantissa_bits=3),
    "e3m2": ExactElement(_float_magnitudes(3, 2, 3, 28), mantissa_bits=2),
    "e4m3": ExactElement(_float_magnitudes(4, 3, 7, 448), mantissa_bits=3),
    "e5m2": ExactElement(_float_magnitudes(5, 2, 15, 57344), mantissa_bits=2),
    "int8": ExactElement(tuple(Fraction(i, 64) for i in range(128)), mantissa_bits=6, has_negative_zero=False),
}


def floor_log2(a: Fraction) -> int:
    exponent = a.numerator.bit_length() - a.denominator.bit_length()
    return exponent if TWO**exponent <= a else exponent - 1


def nearest_code(y: Fraction, element: ExactElement) -> int:
    """Magnitude code of |y|: to nearest, ties to the even code, saturating."""
    magnitudes, y = element.magnitudes, abs(y)
    above = bisect_left(magnitudes, y)
    if above == len(magnitudes):
        return above - 1
    if magnitudes[above] == y:
        return above
    to_below, to_above = y - magnitudes[above - 1], magnitudes[above] - y
    if to_below == to_above:
        return above if above % 2 == 0 else above - 1
    return above if to_above < to_below else above - 1


def floor_exponent(block: Sequence[Fraction], element: ExactElement) -> int:
    return floor_log2(_amax(block)) - element.max_exponent


def even_exponent(block: Sequence[Fraction], element: ExactElement) -> int:
    """Of amax rounded to the element's mantissa bits, halves up."""
    amax = _amax(block)
    step = TWO ** (floor_log2(amax) - element.mantissa_bits)
    rounded = (amax / step + Fraction(1, 2)).__floor__() * step
    return floor_log2(rounded) - element.max_exponent


def rceil_exponent(block: Sequence[Fraction], element: ExactElement) -> int:
    """The smallest e with amax <= max * 2^e."""
    exponent = floor_log2(_amax(block) / element.max)
    return exponent if _amax(block) <= element.max * TWO**exponent else exponent + 1


EXPONENTS = {"floor": floor_exponent, "even": even_exponent, "rceil": rceil_exponent}


def e8m0_byte(exponent: int) -> int:
    return min(max(exponent, -127), 127) + 127


def squared_errors(block: Sequence[Fraction], element: ExactElement) -> dict[int, Fraction]:
    """Squared error under each byte that the `mse` rule compares, in its order of preference."""
    middle = floor_exponent(block, element)
    bytes_ = dict.fromkeys(e8m0_byte(middle + offset) for offset in (-1, 0, 1))
    return {byte: _squared_error(block, TWO ** (byte - 127), element) for byte in bytes_}


def mse_byte(block: Sequence[Fraction], element: ExactElement) -> int:
    errors = squared_errors(block, element)
    return min(errors, key=lambda byte: errors[byte])


def _squared_error(block: Sequence[Fraction], scale: Fraction, element: ExactElement) -> Fraction:
    rounded = (element.magnitudes[nearest_code(x / scale, element)] * scale for x in block)
    return sum(((abs(x) - q) ** 2 for x, q in zip(block, rounded, strict=True)), Fraction(0))


def _amax(block: Sequence[Fraction]) -> Fraction:
    return max(abs(x) for x in block)
