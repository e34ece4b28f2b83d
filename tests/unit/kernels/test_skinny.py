"""Some rows of values times packed MXFP4 weights: against the plain twin, float64, and every code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format
from mxrot.kernels.plain import (
    PackedRows,
    plain_rotate_quantize,
    plain_rotate_quantize_packed,
    plain_values_product,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")
ONES = 0x22
"""A byte of two codes of 1."""

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def random(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, columns, generator=generator))
    return x.to(DEVICE)


def inputs(rows: int, columns: int) -> Tensor:
    return plain_rotate_quantize(random(rows, columns, 0), None, FORMAT, FORMAT.rule()).to(torch.bfloat16)


def weights(rows: int, columns: int) -> PackedRows:
    return plain_rotate_quantize_packed(random(rows, columns, 1), None, FORMAT, FORMAT.rule())


def product(x: Tensor, w: PackedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    from mxrot.kernels.skinny import skinny_product

    return skinny_product(x, w.codes, w.scales, dtype)


def assert_is_product(found: Tensor, x: Tensor, w: PackedRows) -> None:
    """Products are exact in float32; a sum of K of them, in any order, is off by K 2^-24 of their magnitudes at most,
    twice that where matrix hardware cuts sums off instead of rounding them."""
    exact_weights = QTensor.from_packed(w.codes, BlockScales(w.scales, FORMAT.scale), FORMAT).dequantize(torch.float64)
    exact = x.double() @ exact_weights.mT
    bound = x.shape[-1] * 2.0**-23 * (x.double().abs() @ exact_weights.abs().mT)
    assert found.shape == exact.shape and ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16, 17, 33, 128])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (37, 96), (100, 1120)])
def test_it_is_the_product(count: int, rows: int, columns: int) -> None:
    x, w = inputs(count, columns), weights(rows, columns)
    assert_is_product(product(x, w), x, w)
    assert_is_product(plain_values_product(x, w.codes, w.scales, torch.float32), x, w)


def test_a_width_that_steps_divide() -> None:
    x, w = inputs(3, 4096), weights(40, 4096)
    assert_is_product(product(x, w), x, w)


@pytest.mark.parametrize(
    "tile",
    [(8, 16, 2, 4, 2, 1), (16, 32, 1, 8, 4, 2), (32, 16, 1, 4, 1, 1), (8, 64, 4, 4, 4, 1), (16, 32, 1, 16, 16, 3)],
)
@pytest.mark.parametrize("columns", [96, 2048])
def test_every_kind_of_tile(tile: tuple[int, ...], columns: int) -> None:
    from mxrot.kernels.skinny import Tile, product_by_tiles

    x, w = inputs(11, columns), weights(70, columns)
    assert_is_product(product_by_tiles(x, w.codes, w.scales, torch.float32, Tile(*tile)), x, w)


@pytest.mark.parametrize("processors", [1, 108, 132])
@pytest.mark.parametrize("rows", [1, 4096, 6144, 28672])
@pytest.mark.parametrize("count", [1, 9, 128])
def test_tiles_fill_a_device(count: int, rows: int, processors: int) -> None:
    from mxrot.kernels.skinny import choose_tile

    tile = choose_tile(count, rows, processors)
    assert tile.inputs % 8 == 0 and tile.rows % 16 == 0 and tile.warps % tile.split == 0
    programs = -(-rows // tile.height)
    assert tile.height == 16 or programs >= 0.8 * processors * -(-programs // processors)


def test_every_code_at_every_place() -> None:
    x = torch.eye(32, dtype=torch.bfloat16, device=DEVICE)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    scales = torch.full((16, 1), 127, dtype=torch.uint8, device=DEVICE)
    turned = torch.stack([codes.roll(turn) for turn in range(16)])
    found = product(x, PackedRows((turned[:, ::2] | turned[:, 1::2] << 4).to(DEVICE), scales))
    assert torch.equal(found.cpu(), torch.tensor(FORMAT.element.values)[turned.long()].T)


def test_every_scale() -> None:
    """Each from 2^-127 to 2^127; the last ones are too large for float32 with these inputs."""
    x = torch.full((1, 32), 2.0**8, dtype=torch.bfloat16, device=DEVICE)
    x[0, 1:] = 0
    codes = torch.full((255, 16), ONES, dtype=torch.uint8, device=DEVICE)
    scales = torch.arange(255, dtype=torch.uint8, device=DEVICE)[:, None]
    found = product(x, PackedRows(codes, scales))[0].cpu()
    assert torch.equal(found, torch.exp2(torch.arange(255) - 127.0 + 8))


def test_a_sum_that_is_too_large() -> None:
    x = torch.full((1, 32), 2.0**20, dtype=torch.bfloat16, device=DEVICE)
    codes = torch.full((1, 16), ONES, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((1, 1), 254, dtype=torch.uint8, device=DEVICE)
    assert product(x, PackedRows(codes, scales)).item() == float("inf")


def test_nan_in_inputs_and_scales() -> None:
    x, w = inputs(3, 64), weights(5, 64)
    x[1, 40] = float("nan")
    w.codes[3], w.scales[3, 0] = 0, 255
    expected = torch.zeros(3, 5, dtype=torch.bool, device=DEVICE)
    expected[1], expected[:, 3] = True, True
    assert torch.equal(product(x, w).isnan(), expected)


def test_blocks_of_zeros() -> None:
    x, w = inputs(2, 64), weights(3, 64)
    w.codes[1], w.scales[1] = 0, 0
    x[0] = 0
    found = product(x, w)
    assert not found[0].any() and not found[:, 1].any() and found[1, 0] != 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_leading_shapes_and_no_rows(dtype: torch.dtype) -> None:
    x, w = inputs(6, 64), weights(5, 64)
    found = product(x.view(2, 3, 64), w, dtype)
    assert found.shape == (2, 3, 5) and found.dtype == dtype
    # Triton's interpreter cuts float32 off instead of rounding it.
    torch.testing.assert_close(found.view(6, 5).float(), product(x, w), rtol=2.0**-7, atol=0)
    assert product(x[:0], w).shape == (0, 5)
