"""Rows of inputs as integers: the plain twin against the format, the kernel against the twin, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.formats import TensorQuantizer
from mxrot.kernels.plain import IntegerRows, in_planes, plain_quantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUANTIZERS = (
    "int4_row absmax clip 0.9",
    "int4_row absmax",
    "int8_row absmax",
    "int4_row_asym minmax",
    "int4_row_asym minmax clip 0.85",
)

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def rows(count: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator) * torch.exp(3 * torch.randn(count, 1, generator=generator))
    return (x + 0.3 * x.abs().amax(dim=1, keepdim=True)).to(dtype)


def kernel(x: Tensor, spelled: str) -> IntegerRows:
    from mxrot.kernels.fused.quantize_rows import quantize_rows

    quantizer = TensorQuantizer.named(spelled)
    return quantize_rows(x.to(DEVICE), quantizer.format, quantizer.rule)


def plain(x: Tensor, spelled: str) -> IntegerRows:
    quantizer = TensorQuantizer.named(spelled)
    return plain_quantize_rows(x, quantizer.format, quantizer.rule)


def assert_same(found: IntegerRows, expected: IntegerRows) -> None:
    assert torch.equal(found.codes.cpu(), in_planes(expected.codes))
    assert torch.equal(found.scales.cpu().nan_to_num(-1), expected.scales.nan_to_num(-1))


@pytest.mark.parametrize("spelled", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_twin_is_the_format(spelled: str, dtype: torch.dtype) -> None:
    x = rows(7, 160, dtype)
    found = plain(x, spelled)
    assert found.codes.dtype == torch.int8 and found.scales.shape == (7, 1)
    assert torch.equal(found.values, TensorQuantizer.named(spelled)(x))


@pytest.mark.parametrize("spelled", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [16, 576, 4208])
def test_the_kernel_is_the_twin(spelled: str, dtype: torch.dtype, columns: int) -> None:
    x = rows(3, columns, dtype, seed=columns)
    assert_same(kernel(x, spelled), plain(x, spelled))


@pytest.mark.parametrize("spelled", QUANTIZERS)
def test_rows_of_zeros_ties_and_what_is_not_finite(spelled: str) -> None:
    x = rows(9, 32, torch.float32)
    x[0] = 0
    x[1] = torch.arange(32) / 2 - 7  # ties under a scale of 1
    x[2, 5], x[3, 6], x[4, 7] = float("nan"), float("inf"), -float("inf")
    x[5] = 1e-9 * x[6]  # a scale that underflows
    x[7] = 1e7 * (1 + x[8].abs())  # and one that overflows
    found, expected = kernel(x, spelled), plain(x, spelled)
    assert_same(found, expected)
    assert expected.scales.isnan().flatten().tolist() == [row in (2, 3, 4, 7) for row in range(9)]
    assert not found.codes[0].any() and not found.codes[2:5].any()


def test_shapes_strides_and_no_rows() -> None:
    x = rows(6, 128, torch.bfloat16)
    found = kernel(x.view(2, 3, 128)[:, :, :64], QUANTIZERS[0])
    assert found.codes.shape == (2, 3, 64) and found.scales.shape == (2, 3, 1)
    assert_same(found, plain(x.view(2, 3, 128)[:, :, :64], QUANTIZERS[0]))
    assert kernel(x[:0], QUANTIZERS[0]).codes.shape == (0, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spelled", QUANTIZERS)
@pytest.mark.parametrize("columns", [4096, 14336])
def test_wide_rows_on_a_gpu(spelled: str, columns: int) -> None:
    """By one program a row, and by several."""
    x = rows(40, columns, torch.bfloat16)
    assert_same(kernel(x, spelled), plain(x, spelled))
    assert_same(kernel(x[:3], spelled), plain(x[:3], spelled))
