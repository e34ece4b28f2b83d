"""MXFP4 weights lifted to FP8: exact within the window, counted outside, and the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format, quantize
from mxrot.kernels.plain import (
    lift_exponents,
    lift_rows,
    plain_fp8_product,
    plain_lift_weights,
    plain_packed_product,
    plain_rotate_quantize_e5m2,
    plain_rotate_quantize_packed,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")


def weights(rows: int, columns: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of weights whose blocks differ by factors up to 2^spread."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(rows, columns // 32, 32, generator=generator)
    blocks *= 2.0 ** (spread * torch.rand(rows, columns // 32, 1, generator=generator) - spread / 2)
    blocks[0, 0] = 0.0
    blocks[1] = 0.0
    quantized = quantize(blocks.flatten(1), FORMAT)
    return quantized.packed().to(DEVICE), quantized.scales.stored.to(DEVICE)


def values(codes: Tensor, scales: Tensor) -> Tensor:
    return QTensor.from_packed(codes, BlockScales(scales, FORMAT.scale), FORMAT).dequantize()


def test_within_the_window_lifting_is_exact() -> None:
    codes, scales = weights(40, 160, 12.0)
    exponents, outside = lift_exponents(codes, scales)
    assert int(outside) == 0
    lifted = plain_lift_weights(codes, scales, exponents)
    assert lifted.dtype == torch.float8_e4m3fn
    assert torch.equal(lifted.float() * 2.0 ** exponents[:, None], values(codes, scales))
    assert lifted.float().abs().amax(dim=1).max() <= 448


def test_rows_may_share_an_exponent() -> None:
    codes, scales = weights(40, 160, 8.0)
    alone, _ = lift_exponents(codes, scales)
    together, outside = lift_exponents(codes, scales, together=True)
    assert int(outside) == 0 and (together == alone.max()).all() and (alone[2:] < alone.max()).any()
    lifted = plain_lift_weights(codes, scales, together)
    assert torch.equal(lifted.float() * 2.0 ** together[0], values(codes, scales))
    wide, wide_scales = weights(40, 160, 26.0)
    assert lift_exponents(wide, wide_scales, together=True)[1] > lift_exponents(wide, wide_scales)[1]


def test_every_code_at_every_shift() -> None:
    """Exhaustive: all 16 codes, at all shifts of the window and beyond."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    packed = (codes[::2] | codes[1::2] << 4).repeat(21, 1).repeat(1, 2).to(DEVICE)
    scales = (
        torch.stack([torch.arange(127 - 14, 127 + 7), torch.full((21,), 127 + 6)], dim=1).to(torch.uint8).to(DEVICE)
    )
    exponents, outside = lift_exponents(packed, scales)
    assert exponents.tolist() == [0] * 21 and int(outside) == 6  # shifts -14 to -9
    lifted = plain_lift_weights(packed, scales, exponents).float()
    exact = values(packed, scales)
    assert torch.equal(lifted[6:], exact[6:])
    assert (lifted[:6] - exact[:6]).abs().max() <= 2.0**-10


def test_blocks_outside_are_counted() -> None:
    codes, scales = weights(40, 160, 40.0)
    exponents, outside = lift_exponents(codes, scales)
    shifts = scales.int() - 127 - exponents[:, None]
    has_value = (values(codes, scales).unflatten(1, (-1, 32)) != 0).any(dim=2)
    assert int(outside) == int((has_value & (shifts < -8)).sum()) > 10
    assert shifts[has_value].max() == 6


@pytest.mark.parametrize("spread", [12.0, 40.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (33, 160), (64, 256)])
def test_the_kernel_has_the_twins_bits(rows: int, columns: int, spread: float) -> None:
    from mxrot.kernels.fused.lift import lift_weights

    codes, scales = (part[:rows].contiguous() for part in weights(max(rows, 2), columns, spread))
    exponents, _ = lift_exponents(codes, scales)
    expected = plain_lift_weights(codes, scales, exponents)
    found = lift_weights(codes, scales, exponents)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    out = torch.empty_like(found)
    assert lift_weights(codes, scales, exponents, out) is out and torch.equal(out.float(), expected.float())


def test_inputs_with_one_power_of_two_a_token() -> None:
    """Far outside of E5M2; every token within the window of E4M3."""
    from mxrot.kernels.fused.lift import lift_weights

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 96, generator=generator) * 2.0 ** torch.randint(-60, 60, (2, 9, 1), generator=generator)
    packed = plain_rotate_quantize_packed(x.to(DEVICE), None, FORMAT, FORMAT.rule())
    expected = QTensor.dequantize_packed(packed.codes, BlockScales(packed.scales, FORMAT.scale), FORMAT)
    for lift in (plain_lift_weights, lift_weights):
        lifted, exponents = lift_rows(packed, lift)
        assert lifted.dtype == torch.float8_e4m3fn and exponents.shape == (2, 9)
        assert torch.equal(lifted.float() * torch.exp2(exponents.float())[..., None], expected)


def test_the_product_of_what_was_lifted_is_that_of_the_packed_codes() -> None:
    """Both sides are exact within their windows, so only the order of float32 sums can differ."""
    codes, scales = weights(40, 160, 12.0)
    x = torch.randn(20, 160, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x *= torch.exp(2 * torch.randn(20, 160, generator=torch.Generator().manual_seed(2))).to(DEVICE)
    exponents, _ = lift_exponents(codes, scales)
    for shift in (-2, 0, 3):
        inputs = plain_rotate_quantize_e5m2(x, None, FORMAT, FORMAT.rule(), shift)
        row_scales = torch.exp2(exponents.float() + shift)
        found = plain_fp8_product(inputs, plain_lift_weights(codes, scales, exponents), row_scales, torch.float32)
        packed = plain_rotate_quantize_packed(x, None, FORMAT, FORMAT.rule())
        expected = plain_packed_product(packed, codes, scales, torch.float32)
        size = values(packed.codes, packed.scales).abs() @ values(codes, scales).abs().mT
        assert ((found - expected).abs() <= 2.0**-20 * size).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_the_fp8_product_on_matrix_hardware(rows: int, together: bool) -> None:
    from mxrot.kernels.fp8 import fp8_product

    codes, scales = weights(64, 512, 6.0)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    inputs = plain_rotate_quantize_e5m2(x, None, FORMAT, FORMAT.rule())
    exponents, outside = lift_exponents(codes, scales, together)
    assert not int(outside)
    factors = torch.exp2((exponents[0] if together else exponents).float())
    operands = inputs, plain_lift_weights(codes, scales, exponents), factors
    expected = plain_fp8_product(*operands, torch.float32)
    for dtype, bound in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11 if together else 2.0**-8)):
        found = fp8_product(*operands, dtype)
        assert found.dtype == dtype
        assert float((found.float() - expected).norm() / expected.norm()) < bound
