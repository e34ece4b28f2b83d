"""Codes that others have stored: every code under every scale, and transformers' own reading of them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mxrot.formats.given_codes import from_mxfp4, from_tiles

MAGNITUDES = (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)
VALUES = [*MAGNITUDES, *(-value for value in MAGNITUDES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_under_every_exponent(dtype: torch.dtype) -> None:
    """Two blocks of an exponent: the codes in order, twice."""
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[::2] | codes[1::2] << 4).repeat(2).expand(256, 1, 16)
    found = from_mxfp4(packed, torch.arange(256, dtype=torch.uint8)[:, None], dtype)
    assert found.shape == (256, 32) and found.dtype == dtype
    assert found[255].isnan().all()
    for exponent in range(255):
        exact = torch.tensor([math.ldexp(value, exponent - 127) for value in VALUES * 2], dtype=torch.float64)
        assert torch.equal(found[exponent], exact.float().to(dtype))
        assert torch.equal(found[exponent].signbit(), exact.signbit())


def test_it_is_what_transformers_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 6, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 6, 2), generator=generator, dtype=torch.uint8)
    assert torch.equal(from_mxfp4(blocks, scales, torch.bfloat16).mT, convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 1), (3, 2)])
def test_each_tile_has_its_factor(shape: tuple[int, int]) -> None:
    """Tiles of two rows and three columns; the last ones need not be whole."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    factors = torch.rand(-(-shape[0] // 2), -(-shape[1] // 3), generator=generator)
    found = from_tiles(codes, factors, 2, 3, torch.float64)
    assert found.shape == shape
    for row in range(shape[0]):
        for column in range(shape[1]):
            assert float(found[row, column]) == float(codes[row, column].float() * factors[row // 2, column // 3])
