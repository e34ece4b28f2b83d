"""The product on hardware that takes block scales: against the packed product, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format, quantize
from mxrot.kernels.fused.block_scaled import block_scaled_product
from mxrot.kernels.plain import plain_packed_product, plain_rotate_quantize_packed, swizzle_scales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))).to(DEVICE)


@pytest.mark.parametrize(("count", "rows", "width"), [(1, 8, 32), (5, 130, 160), (129, 40, 96), (3, 128, 256)])
def test_it_is_the_product_of_the_packed_codes(count: int, rows: int, width: int) -> None:
    """Products of two E2M1 numbers are exact, and so is everything but K / 32 sums of float32."""
    weight = quantize(random(rows, width, seed=0), FORMAT)
    codes, scales = weight.packed(), weight.scales.stored
    x = random(count, width, seed=1)
    plain = plain_rotate_quantize_packed(x, None, FORMAT, FORMAT.rule())
    swizzled = plain_rotate_quantize_packed(x, None, FORMAT, FORMAT.rule(), swizzled=True)
    found = block_scaled_product(swizzled, codes, swizzle_scales(scales), torch.float32)
    expected = plain_packed_product(plain, codes, scales, torch.float32)
    inputs = QTensor.dequantize_packed(plain.codes, BlockScales(plain.scales, FORMAT.scale), FORMAT)
    size = inputs.abs() @ weight.dequantize().abs().mT
    assert ((found - expected).abs() <= 2.0**-20 * size).all()


def test_no_rows() -> None:
    weight = quantize(random(8, 64, seed=0), FORMAT)
    empty = plain_rotate_quantize_packed(torch.empty(0, 64, device=DEVICE), None, FORMAT, FORMAT.rule(), swizzled=True)
    found = block_scaled_product(empty, weight.packed(), swizzle_scales(weight.scales.stored), torch.bfloat16)
    assert found.shape == (0, 8) and found.dtype == torch.bfloat16
