"""A few rows of MXFP4 times MXFP4 weights: against the plain twin, float64, and every pair of codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format
from mxrot.kernels.plain import PackedRows, plain_packed_product, plain_rotate_quantize_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def packed(rows: int, columns: int, seed: int) -> PackedRows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(2 * torch.randn(rows, columns, generator=generator))
    return plain_rotate_quantize_packed(x.to(DEVICE), None, FORMAT, FORMAT.rule())


def values(operand: PackedRows) -> Tensor:
    return QTensor.from_packed(operand.codes, BlockScales(operand.scales, FORMAT.scale), FORMAT).dequantize(
        torch.float64
    )


def matvec(inputs: PackedRows, weights: PackedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    from mxrot.kernels.matvec import packed_matvec

    return packed_matvec(inputs, weights.codes, weights.scales, dtype)


@pytest.mark.parametrize("inputs", [1, 2, 3, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (37, 1024 + 96), (64, 2048)])
def test_it_is_the_product(inputs: int, rows: int, columns: int) -> None:
    x, w = packed(inputs, columns, 0), packed(rows, columns, 1)
    exact = values(x) @ values(w).mT
    bound = 2.0**-20 * (values(x).abs() @ values(w).abs().mT)
    for found in (matvec(x, w), plain_packed_product(x, w.codes, w.scales, torch.float32)):
        assert found.shape == (inputs, rows) and ((found.double() - exact).abs() <= bound).all()


def test_every_pair_of_codes() -> None:
    """Exhaustive: each code of the input against each of the weight, at each place of a block."""
    for place in range(32):
        codes = torch.zeros(16, 32, dtype=torch.uint8)
        codes[:, place] = torch.arange(16)
        both = (codes[:, ::2] | codes[:, 1::2] << 4).to(DEVICE)
        scales = torch.full((16, 1), 127, dtype=torch.uint8, device=DEVICE)
        weights = PackedRows(both, scales)
        elements = torch.tensor(FORMAT.element.values)
        for start in (0, 8):
            found = matvec(PackedRows(both[start : start + 8], scales[:8]), weights)
            assert torch.equal(found.cpu(), elements[start : start + 8, None] * elements)


def test_scales_from_one_end_to_the_other() -> None:
    codes = torch.full((4, 16), 0x22, dtype=torch.uint8, device=DEVICE)  # ones
    scales = torch.tensor([[0], [100], [154], [254]], dtype=torch.uint8, device=DEVICE)
    found = matvec(PackedRows(codes[:1], scales[2:3]), PackedRows(codes, scales))
    assert found[0].tolist() == [32 * 2.0**-100, 32.0, 32 * 2.0**54, float("inf")]


def test_a_scale_that_is_nan() -> None:
    x, w = packed(2, 64, 0), packed(5, 64, 1)
    x.scales[1, 1] = 255
    w.scales[3, 0] = 255
    isnan = matvec(x, w).isnan()
    expected = torch.zeros(2, 5, dtype=torch.bool, device=isnan.device)
    expected[1], expected[:, 3] = True, True
    assert torch.equal(isnan, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_and_leading_shapes(dtype: torch.dtype) -> None:
    x, w = packed(6, 64, 0), packed(5, 64, 1)
    shaped = PackedRows(x.codes.view(2, 3, -1), x.scales.view(2, 3, -1))
    found = matvec(shaped, w, dtype)
    assert found.shape == (2, 3, 5) and found.dtype == dtype
    # Triton's interpreter cuts float32 off instead of rounding it.
    torch.testing.assert_close(found.view(6, 5).float(), matvec(x, w), rtol=2.0**-7, atol=0)
    nothing = matvec(PackedRows(x.codes[:0], x.scales[:0]), w, dtype)
    assert nothing.shape == (0, 5)
