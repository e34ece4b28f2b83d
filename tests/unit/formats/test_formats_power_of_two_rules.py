"""floor, even, rceil and mse against the exact twin."""

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from tests.oracles.exact_blocks import (
    ELEMENTS,
    EXPONENTS,
    ExactElement,
    e8m0_byte,
    mse_byte,
    nearest_code,
    squared_errors,
)
from torch import Tensor

from mxrot.formats import FORMATS, Format, quantize

MX = [FORMATS[name] for name in ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8")]
formats = pytest.mark.parametrize("format", MX, ids=lambda format: format.name)

# Fractions of 23 bits: 1, the thresholds of every rule and element (3/2, 7/4, 15/8, 31/16, 127/64, 2 - 2^-7),
# their neighbours, and the last below 2.
_THRESHOLDS = (0x400000, 0x600000, 0x700000, 0x780000, 0x7E0000, 0x7F0000)
FRACTIONS = sorted({0, 1, 0x200000, 0x7FFFFE, 0x7FFFFF, *(t + d for t in _THRESHOLDS for d in (-1, 0, 1))})


def _maxima() -> Tensor:
    """Every exponent field of float32 with each of FRACTIONS; field 0 holds the subnormal numbers."""
    fields = torch.arange(255, dtype=torch.int32)[:, None] << 23
    values = (fields | torch.tensor(FRACTIONS, dtype=torch.int32)).flatten().view(torch.float32)
    return values[values > 0]


def _blocks(maxima: Tensor) -> Tensor:
    """Blocks of 32 with these maxima, somewhere and of either sign; the others are spread over octaves."""
    generator = torch.Generator().manual_seed(5)
    count = len(maxima)
    octaves = torch.rand(count, 32, generator=generator) * -6
    blocks = torch.rand(count, 32, generator=generator) * octaves.exp2() * (maxima * 0.999)[:, None]
    blocks[torch.arange(count), torch.arange(count) % 32] = maxima
    return blocks * torch.randn(count, 32, generator=generator).sign()


def _fractions(block: Tensor) -> list[Fraction]:
    return [Fraction(x) for x in block.tolist()]


def _codes(block: Sequence[Fraction], signs: Sequence[bool], byte: int, format: Format) -> list[int]:
    element, width = ELEMENTS[format.element.name], format.element.bits
    magnitudes = [nearest_code(x / Fraction(2) ** (byte - 127), element) for x in block]
    if element.has_negative_zero:
        return [m | negative << (width - 1) for m, negative in zip(magnitudes, signs, strict=True)]
    return [-m % (1 << width) if negative else m for m, negative in zip(magnitudes, signs, strict=True)]


@pytest.mark.parametrize("rule", EXPONENTS)
@formats
def test_scale_bytes_of_every_exponent(format: Format, rule: str) -> None:
    maxima = _maxima()
    stored = quantize(_blocks(maxima), format, format.rule(rule)).scales.stored
    element = ELEMENTS[format.element.name]
    expected = [e8m0_byte(EXPONENTS[rule]([Fraction(a)], element)) for a in maxima.tolist()]
    assert stored.flatten().tolist() == expected


@pytest.mark.parametrize("rule", EXPONENTS)
@formats
def test_codes(format: Format, rule: str) -> None:
    blocks = _blocks(_maxima())[::61]
    quantized = quantize(blocks, format, format.rule(rule))
    for block, codes, byte in zip(
        blocks, quantized.codes.tolist(), quantized.scales.stored.flatten().tolist(), strict=True
    ):
        assert codes == _codes(_fractions(block), block.signbit().tolist(), byte, format)


@formats
def test_mse_takes_the_scale_of_least_error(format: Format) -> None:
    """Its errors are float32 sums of 32 squares, each within 33 * 2^-24 of the exact one, relatively."""
    blocks = _blocks(_maxima())[::37]
    element = ELEMENTS[format.element.name]
    stored = quantize(blocks, format, format.rule("mse")).scales.stored.flatten().tolist()
    for block, byte in zip(map(_fractions, blocks), stored, strict=True):
        errors = squared_errors(block, element)
        assert errors[byte] <= min(errors.values()) * (1 + Fraction(2 * 33, 1 << 24))


@pytest.mark.parametrize("exponent", [-110, -70, 0, 70, 120])
@formats
def test_mse_takes_the_smallest_of_equal_errors(format: Format, exponent: int) -> None:
    """Multiples of 1/16 below 8: their errors are exact in float32, and often 0 under several scales."""
    generator = torch.Generator().manual_seed(exponent)
    shrink = 2 ** torch.arange(6)[:, None].repeat(9, 1)
    sixteenths = torch.randint(-127, 128, (54, 32), generator=generator) // shrink
    blocks = torch.ldexp(sixteenths.float() / 16, torch.tensor(exponent))
    element = ELEMENTS[format.element.name]
    stored = quantize(blocks, format, format.rule("mse")).scales.stored.flatten().tolist()
    assert stored == [mse_byte(_fractions(block), element) for block in blocks]


@pytest.mark.parametrize(
    ("largest", "others", "exponent"),
    [
        (4.0, 0.75, -1),  # 0.75 is a tie under 2^0 and exact under 2^-1, where 4 saturates at 3
        (4.0, 3.0, 0),  # both exact, and not under 2^-1
        (7.9, 7.9, 1),  # 8 under 2^1, saturates at 6 under 2^0
    ],
)
def test_mse_can_take_each_of_its_three_scales(largest: float, others: float, exponent: int) -> None:
    format = FORMATS["mxfp4"]
    block = torch.full((1, 32), others)
    block[0, 9] = -largest
    assert quantize(block, format, format.rule("mse")).scales.stored.item() - 127 == exponent


@pytest.mark.parametrize(
    ("amax", "floor", "even", "rceil", "quarter"),
    [
        (4.0, 0, 0, 0, 0),
        (6.0, 0, 0, 0, 0),
        (6.0001, 0, 0, 1, 0),
        (6.9999, 0, 0, 1, 0),
        (7.0, 0, 1, 1, 0),
        (7.25, 0, 1, 1, 0),
        (7.2501, 0, 1, 1, 1),
        (7.999, 0, 1, 1, 1),
        (7.25 * 2**-126, -126, -125, -125, -126),
    ],
)
def test_mxfp4_by_hand(amax: float, floor: int, even: int, rceil: int, quarter: int) -> None:
    format = FORMATS["mxfp4"]
    block = torch.linspace(-1, 1, 32) * amax
    for rule, exponent in (("floor", floor), ("even", even), ("rceil", rceil), ("7.25", quarter)):
        assert quantize(block, format, format.rule(rule)).scales.stored.item() - 127 == exponent


def test_the_twin_knows_the_ties_of_e2m1() -> None:
    element: ExactElement = ELEMENTS["e2m1"]
    ties = ("1/4", "3/4", "5/4", "7/4", "5/2", "7/2", "5")
    assert [element.magnitudes[nearest_code(Fraction(t), element)] for t in ties] == [0, 1, 1, 2, 2, 4, 4]
