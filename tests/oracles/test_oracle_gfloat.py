"""Elements, E8M0 and the `floor` rule against gfloat.

Where it differs: it writes the most negative int8 code, -128, which stands for -2, where ours is symmetric and
stops at -127. So its -2 is raised to -127/64 before the comparison.
"""

import math

import numpy as np
import pytest
import torch
from gfloat import RoundMode, decode_ndarray, encode_ndarray, quantize_block, round_ndarray
from gfloat import formats as gfloat_formats
from gfloat.block import compute_scale_amax
from tests.oracles.element_grid import rounding_grid
from tests.oracles.sample_blocks import bits, sample

from mxrot.formats import FORMATS, BlockScales, Element, Format, quantize
from mxrot.formats.block_scales import E8M0
from mxrot.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, INT8

ELEMENTS = {
    E2M1: gfloat_formats.format_info_ocp_e2m1,
    E2M3: gfloat_formats.format_info_ocp_e2m3,
    E3M2: gfloat_formats.format_info_ocp_e3m2,
    E4M3: gfloat_formats.format_info_ocp_e4m3,
    E5M2: gfloat_formats.format_info_ocp_e5m2,
    INT8: gfloat_formats.format_info_ocp_int8,
}
BLOCKS = {
    "mxfp4": gfloat_formats.format_info_mxfp4_e2m1,
    "mxfp6_e2m3": gfloat_formats.format_info_mxfp6_e2m3,
    "mxfp6_e3m2": gfloat_formats.format_info_mxfp6_e3m2,
    "mxfp8_e4m3": gfloat_formats.format_info_mxfp8_e4m3,
    "mxfp8_e5m2": gfloat_formats.format_info_mxfp8_e5m2,
    "mxint8": gfloat_formats.format_info_mxint8,
}
elements = pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: element.name)


def _their_values_and_codes(element: Element, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    info = ELEMENTS[element]
    rounded = round_ndarray(info, y, RoundMode.TiesToEven, sat=True)
    if element is INT8:
        rounded = np.maximum(rounded, -element.max)
    return torch.from_numpy(rounded), torch.from_numpy(encode_ndarray(info, rounded).astype(np.uint8))


@elements
def test_decodes_every_code(element: Element) -> None:
    codes = np.arange(1 << element.bits)
    theirs = decode_ndarray(ELEMENTS[element], codes)
    for ours, expected in zip(element.values, theirs, strict=True):
        assert (
            math.isnan(ours)
            if math.isnan(expected)
            else (ours, math.copysign(1, ours))
            == (
                expected,
                math.copysign(1, expected),
            )
        )


@elements
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounds_values_midpoints_and_their_neighbours(element: Element, dtype: torch.dtype) -> None:
    y = rounding_grid(element, dtype)
    values, codes = _their_values_and_codes(element, y.double().numpy())
    assert torch.equal(element.encode(y), codes)
    assert torch.equal(bits(element.round(y)), bits(values.to(dtype)))


def test_every_scale_byte() -> None:
    theirs = decode_ndarray(gfloat_formats.format_info_ocp_e8m0, np.arange(256))
    ours = BlockScales(torch.arange(256, dtype=torch.uint8), E8M0).values(torch.float64).numpy()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("format", [FORMATS[name] for name in BLOCKS], ids=lambda format: format.name)
@pytest.mark.parametrize("name", ["normal", "student_t", "zeros", "every_exponent"])
def test_quantizes_blocks_by_the_floor_rule(format: Format, name: str) -> None:
    x = sample(name, format.element, format.block).double().unflatten(-1, (-1, format.block)).flatten(0, 1)[::7]
    ours = quantize(x, format, format.rule("floor")).dequantize(torch.float64)
    theirs = torch.stack(
        [torch.from_numpy(quantize_block(BLOCKS[format.name], block, compute_scale_amax)) for block in x.numpy()]
    )
    if format.element is INT8:
        scales = quantize(x, format, format.rule("floor")).scales.values(torch.float64)
        theirs = torch.maximum(theirs, -format.element.max * scales)
    assert torch.equal(ours, theirs)
