"""Elements by hand: what each code means, how ties, ends and zeros round."""

import math

import pytest
import torch
from tests.oracles.exact_blocks import ELEMENTS as EXACT
from tests.oracles.sample_blocks import bits

from mxrot.formats.element import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    INT4,
    INT8,
    UINT2,
    UINT4,
    Element,
    binary_exponents,
    powers_of_two,
)

FLOATS = [E2M1, E2M3, E3M2, E4M3, E5M2]
each_float = pytest.mark.parametrize("element", FLOATS, ids=lambda element: element.name)
each_element = pytest.mark.parametrize("element", [*FLOATS, INT8, INT4, UINT4, UINT2], ids=lambda element: element.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def test_e2m1_codes() -> None:
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert E2M1.values[:8] == magnitudes
    assert E2M1.values[8:] == tuple(-m for m in magnitudes)
    assert math.copysign(1, E2M1.values[8]) == -1


@pytest.mark.parametrize(
    ("element", "largest", "max_exponent", "smallest", "mantissa_bits"),
    [
        (E2M1, 6.0, 2, 0.5, 1),
        (E2M3, 7.5, 2, 0.125, 3),
        (E3M2, 28.0, 4, 0.0625, 2),
        (E4M3, 448.0, 8, 2.0**-9, 3),
        (E5M2, 57344.0, 15, 2.0**-16, 2),
        (INT8, 127 / 64, 0, 1 / 64, 6),
        (INT4, 7.0, 2, 1.0, 2),
        (UINT4, 15.0, 3, 1.0, 3),
        (UINT2, 3.0, 1, 1.0, 1),
    ],
    ids=lambda value: value.name if isinstance(value, Element) else "",
)
def test_range(element: Element, largest: float, max_exponent: int, smallest: float, mantissa_bits: int) -> None:
    assert element.max == largest
    assert element.max_exponent == max_exponent
    assert element.values[1] == smallest
    assert element.mantissa_bits == mantissa_bits


@pytest.mark.parametrize("name", EXACT)
def test_magnitudes_are_those_of_the_definition(name: str) -> None:
    element = {e.name: e for e in (*FLOATS, INT8)}[name]
    expected = [float(m) for m in EXACT[name].magnitudes]
    assert list(element.values[: len(expected)]) == expected


def test_e5m2_and_e4m3_have_codes_that_are_no_numbers() -> None:
    assert E5M2.values[0x7C] == math.inf and E5M2.values[0xFC] == -math.inf
    for code in (0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF):
        assert math.isnan(E5M2.values[code])
    assert math.isnan(E4M3.values[0x7F]) and math.isnan(E4M3.values[0xFF])
    assert sum(map(math.isfinite, E4M3.values)) == 254


def test_integer_codes() -> None:
    assert INT4.values == (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
    assert UINT4.values == tuple(range(16)) and UINT2.values == (0, 1, 2, 3)
    assert INT8.values[0x7F] == 127 / 64 and INT8.values[0x80] == -2.0 and INT8.values[0xFF] == -1 / 64


@dtypes
def test_e2m1_ties_go_to_the_even_code(dtype: torch.dtype) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=dtype)
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0], dtype=dtype)
    codes = torch.tensor([0, 2, 2, 4, 4, 6, 6], dtype=torch.uint8)
    for sign, sign_bit in ((1, 0), (-1, 8)):
        assert torch.equal(bits(E2M1.round(sign * ties)), bits(sign * expected))
        assert torch.equal(E2M1.encode(sign * ties), codes | sign_bit)


@dtypes
@each_element
def test_every_value_keeps_its_code(element: Element, dtype: torch.dtype) -> None:
    """But the most negative integer, which is read and never written."""
    codes = torch.arange(1 << element.bits, dtype=torch.uint8)
    values = element.decode(codes, dtype)
    is_written = values.abs() <= element.max
    assert torch.equal(element.encode(values[is_written]), codes[is_written])
    assert torch.equal(bits(element.round(values[is_written])), bits(values[is_written]))
    lowest = element.round(values.nan_to_num(neginf=-math.inf)).min()
    assert lowest == (0 if element in (UINT4, UINT2) else -element.max)


@dtypes
@each_element
def test_saturation(element: Element, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    y = torch.tensor([element.max, element.max * 1.001, element.max * 2, 1e38, largest, math.inf], dtype=dtype)
    low = 0.0 if element in (UINT4, UINT2) else -element.max
    assert (element.round(y) == element.max).all()
    assert (element.round(-y) == low).all()
    assert (element.decode(element.encode(y), dtype) == element.max).all()
    assert (element.decode(element.encode(-y), dtype) == low).all()


@each_element
def test_nan_stays_nan(element: Element) -> None:
    assert element.round(torch.tensor([math.nan])).isnan().all()


@dtypes
@each_element
def test_signs_of_zero(element: Element, dtype: torch.dtype) -> None:
    """Kept by floats, also by numbers that round to zero; an integer has one zero."""
    y = torch.tensor([0.0, -0.0, 1e-30, -1e-30], dtype=dtype)
    keeps = element in FLOATS
    expected = torch.tensor([0.0, -0.0, 0.0, -0.0] if keeps else [0.0] * 4, dtype=dtype)
    negative_zero = 1 << (element.bits - 1) if keeps else 0
    assert torch.equal(bits(element.round(y)), bits(expected))
    assert element.encode(y).tolist() == [0, negative_zero, 0, negative_zero]


@each_float
def test_rounding_leaves_its_input(element: Element) -> None:
    y = torch.linspace(-2, 2, 31) * element.max
    before = y.clone()
    element.round(y)
    element.encode(y)
    assert torch.equal(y, before)


@dtypes
def test_binary_exponents_of_every_binade(dtype: torch.dtype) -> None:
    lowest, highest = {torch.float32: (-126, 127), torch.float64: (-1022, 1023)}[dtype]
    for exponent in range(lowest, highest + 1):
        power = torch.tensor(math.ldexp(1.0, exponent), dtype=dtype)
        last = torch.nextafter(2 * power, torch.zeros_like(power)) if exponent < highest else power * 1.5
        assert binary_exponents(power) == binary_exponents(-last) == exponent
    small = torch.tensor([0.0, -0.0, math.ldexp(1.0, lowest) / 2], dtype=dtype)
    assert (binary_exponents(small) == lowest - 1).all()
    assert (binary_exponents(torch.tensor([math.inf, math.nan], dtype=dtype)) == highest + 1).all()


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-127, 128)
    assert powers_of_two(exponents).tolist() == [math.ldexp(1.0, e) for e in range(-127, 128)]
