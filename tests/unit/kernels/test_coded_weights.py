"""Inputs in 16 bits times weights in codes: the kernel and the plain twin against float64, every code and scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format, quantize
from mxrot.kernels.coded_weights import MOST_ROWS, PATH, READ_PACKED, choose_coded, coded_product
from mxrot.kernels.fixed_rows import invariant_rows
from mxrot.kernels.fused.coded_weights import coded_product as fused
from mxrot.kernels.fused.coded_weights import codes_of
from mxrot.kernels.plain import coded_weights
from mxrot.kernels.plain.coded_weights import CodedWeight, plain_coded_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def drawn(rows: int, columns: int, name: str, seed: int = 0) -> CodedWeight:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))
    found = quantize(w, get_format(name))
    return CodedWeight(found.packed().to(DEVICE), found.scales.stored.to(DEVICE), found.format)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


def exact(x: Tensor, weight: CodedWeight) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of the magnitudes of its terms."""
    values = QTensor.from_packed(weight.codes, BlockScales(weight.scales, weight.format.scale), weight.format)
    wide = values.dequantize(torch.float64)
    return x.double() @ wide.mT, x.double().abs() @ wide.abs().mT


def assert_is_close(found: Tensor, x: Tensor, weight: CodedWeight) -> None:
    """Products are exact: K roundings of float32 at most, each relative to the sum of the magnitudes so far."""
    expected, magnitudes = exact(x, weight)
    assert found.shape == expected.shape and found.isfinite().all()
    assert ((found.double() - expected).abs() <= x.shape[-1] * 2.0**-24 * magnitudes).all()


@pytest.mark.parametrize("name", READ_PACKED)
@pytest.mark.parametrize(("rows", "columns", "count"), [(1, 32, 1), (3, 160, 70), (17, 128, 64), (40, 96, 65)])
def test_kernel_gives_the_exact_product_up_to_the_order_of_sums(name: str, rows: int, columns: int, count: int) -> None:
    weight, x = drawn(count, columns, name), inputs(rows, columns)
    assert_is_close(fused(x, weight, torch.float32), x, weight)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "mxfp6_e2m3", "mxint8"])
def test_plain_twin_gives_the_exact_product_however_many_rows_it_writes_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = drawn(70, 96, name), inputs(2, 5, 96)
    assert_is_close(plain_coded_product(x, weight), x, weight)
    monkeypatch.setattr(coded_weights, "WRITTEN_OUT", 96 * 8)
    assert_is_close(plain_coded_product(x, weight), x, weight)
    assert_is_close(coded_product(x, weight, torch.float32), x, weight)


@pytest.mark.parametrize("name", READ_PACKED)
def test_every_code_under_every_scale_that_keeps_its_bits(name: str) -> None:
    format = get_format(name)
    numbers = torch.arange(2**format.bits, dtype=torch.uint8)
    values = format.element.decode(numbers, torch.float32)
    numbers = numbers[values.isfinite()]
    codes = numbers.repeat(-(-32 // len(numbers)) + 1)[: 32 * (len(numbers) // 32 + 1)].view(-1, 32)
    scales = torch.arange(67, 188, dtype=torch.uint8)  # 2^-60 to 2^60
    each = codes.repeat(len(scales), 1)
    found = QTensor(each, BlockScales(scales.repeat_interleave(len(codes))[:, None], format.scale), format)
    weight = CodedWeight(found.packed().to(DEVICE), found.scales.stored.to(DEVICE), format)
    one = torch.eye(32, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(fused(one, weight, torch.float32).cpu().mT, found.dequantize())


@pytest.mark.parametrize(("name", "stored"), [("mxfp8_e4m3", 188), ("mxfp4", 254), ("mxfp4", 255), ("mxint8", 255)])
def test_rows_with_a_scale_that_the_kernel_cannot_apply_are_nan_and_no_others(name: str, stored: int) -> None:
    weight = drawn(5, 256, name)
    weight.scales[3, 6] = stored
    found = fused(inputs(2, 256), weight, torch.float32)
    assert found[:, 3].isnan().all() and found[:, [0, 1, 2, 4]].isfinite().all()


def test_a_fixed_tile_gives_a_row_the_bits_that_it_has_alone() -> None:
    weight, x = drawn(65, 160, "mxfp8_e4m3"), inputs(40, 160)
    together = fused(x, weight, torch.bfloat16, is_fixed=True)
    alone = torch.cat([fused(row[None], weight, torch.bfloat16, is_fixed=True) for row in x])
    assert torch.equal(together, alone)


def test_formats_that_the_kernel_reads_are_those_it_is_chosen_for() -> None:
    names = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8")
    assert tuple(name for name in names if codes_of(get_format(name)) is not None) == READ_PACKED


def test_choice_says_why_weights_are_written_out() -> None:
    weight, gpu = drawn(4, 32, "mxfp8_e4m3"), torch.device("cuda")
    assert choose_coded(1, weight, torch.bfloat16, gpu).path == PATH
    assert choose_coded(MOST_ROWS, weight, torch.bfloat16, gpu).path == PATH
    assert f"more than {MOST_ROWS}" in choose_coded(MOST_ROWS + 1, weight, torch.bfloat16, gpu).reason
    with invariant_rows():
        assert choose_coded(MOST_ROWS + 1, weight, torch.bfloat16, gpu).path == PATH
    assert "not in float16" in choose_coded(1, weight, torch.float16, gpu).reason
    assert "not mxfp6_e2m3" in choose_coded(1, drawn(4, 32, "mxfp6_e2m3"), torch.bfloat16, gpu).reason
    assert "not on cpu" in choose_coded(1, weight, torch.bfloat16, torch.device("cpu")).reason


def test_no_rows_and_no_weights() -> None:
    weight = drawn(4, 32, "mxfp4")
    assert fused(inputs(0, 32), weight, torch.bfloat16).shape == (0, 4)
    assert coded_product(inputs(2, 0, 32), weight, torch.bfloat16).shape == (2, 0, 4)
