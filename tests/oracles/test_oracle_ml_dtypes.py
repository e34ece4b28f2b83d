"""Elements and E8M0 against ml_dtypes.

Where it differs:
- Its float8_e4m3fn and float8_e5m2 overflow to NaN and Inf, as IEEE conversions do, and ours saturate: the
  inputs of those two are clipped to the largest finite value before they are handed over.
- It converts float64 through float32, and so rounds twice: of float64 it gets the numbers that float32 holds.
  (gfloat rounds float64 once and is compared on all of them.)
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.oracles.element_grid import rounding_grid
from tests.oracles.sample_blocks import bits

from mxrot.formats import BlockScales
from mxrot.formats.block_scales import E8M0
from mxrot.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, FloatElement
from mxrot.formats.exponents import e8m0_bytes

ELEMENTS = {
    E2M1: ml_dtypes.float4_e2m1fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E3M2: ml_dtypes.float6_e3m2fn,
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
}
elements = pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: element.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@elements
@dtypes
def test_decodes_every_code(element: FloatElement, dtype: torch.dtype) -> None:
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    theirs = torch.from_numpy(codes.view(ELEMENTS[element]).astype(np.float64)).to(dtype)
    ours = element.decode(torch.from_numpy(codes), dtype)
    assert torch.equal(ours.isnan(), theirs.isnan())
    finite = ~theirs.isnan()
    assert torch.equal(bits(ours)[finite], bits(theirs)[finite])


@elements
@dtypes
def test_rounds_values_midpoints_and_their_neighbours(element: FloatElement, dtype: torch.dtype) -> None:
    y = rounding_grid(element, dtype)
    y = y[y.float() == y]
    in_range = y.clamp(-element.max, element.max) if element.bits == 8 else y
    theirs = in_range.numpy().astype(ELEMENTS[element])
    assert torch.equal(element.encode(y), torch.from_numpy(theirs.view(np.uint8)))
    assert torch.equal(bits(element.round(y)), bits(torch.from_numpy(theirs.astype(np.float64)).to(dtype)))


@dtypes
def test_every_scale_byte(dtype: torch.dtype) -> None:
    codes = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)).to(dtype)
    ours = BlockScales(torch.from_numpy(codes), E8M0).values(dtype)
    assert torch.equal(ours[:255], theirs[:255])
    assert ours[255].isnan() and theirs[255].isnan()


def test_writes_the_scale_byte_of_every_power_of_two() -> None:
    exponents = np.arange(-127, 128)
    theirs = np.exp2(exponents.astype(np.float64)).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    ours = e8m0_bytes(torch.from_numpy(exponents), maxima=torch.ones(255))
    assert torch.equal(ours, torch.from_numpy(theirs))
