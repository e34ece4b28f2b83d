"""Some rows of MXFP4 times packed MXFP4 weights: against the plain twin, float64, every code and every scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format
from mxrot.kernels.plain import PackedRows, plain_packed_product, plain_rotate_quantize_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")
ONES = 0x22
"""A byte of two codes of 1."""

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def packed(rows: int, columns: int, seed: int) -> PackedRows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(2 * torch.randn(rows, columns, generator=generator))
    return plain_rotate_quantize_packed(x.to(DEVICE), None, FORMAT, FORMAT.rule())


def values(operand: PackedRows) -> Tensor:
    scales = BlockScales(operand.scales, FORMAT.scale)
    return QTensor.from_packed(operand.codes, scales, FORMAT).dequantize(torch.float64)


def product(x: PackedRows, w: PackedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    from mxrot.kernels.fused.skinny import skinny_product

    return skinny_product(x, w.codes, w.scales, dtype)


def assert_is_product(found: Tensor, x: PackedRows, w: PackedRows) -> None:
    """Products are exact in float32; a sum of K of them, in any order, is off by K 2^-24 of their magnitudes at most,
    twice that where matrix hardware cuts sums off instead of rounding them."""
    exact = values(x) @ values(w).mT
    bound = values(x).shape[-1] * 2.0**-23 * (values(x).abs() @ values(w).abs().mT)
    assert found.shape == exact.shape and ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16, 17, 33, 128])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (37, 96), (100, 1120)])
def test_it_is_the_product(count: int, rows: int, columns: int) -> None:
    x, w = packed(count, columns, 0), packed(rows, columns, 1)
    assert_is_product(product(x, w), x, w)
    assert_is_product(plain_packed_product(x, w.codes, w.scales, torch.float32), x, w)


def test_a_width_that_steps_divide() -> None:
    x, w = packed(3, 4096, 0), packed(40, 4096, 1)
    assert_is_product(product(x, w), x, w)


@pytest.mark.parametrize(
    "tile",
    [
        (8, 16, 2, 4),
        (16, 32, 1, 8),
        (32, 16, 1, 4),
        (8, 64, 4, 4),
        (16, 32, 1, 16),
    ],
)
@pytest.mark.parametrize("columns", [96, 2048])
def test_every_kind_of_tile(tile: tuple[int, ...], columns: int) -> None:
    from mxrot.kernels.fused.skinny import Tile, product_by_tiles

    x, w = packed(11, columns, 0), packed(70, columns, 1)
    found = product_by_tiles(x, w.codes, w.scales, torch.float32, Tile(*tile))
    assert_is_product(found, x, w)
    assert torch.equal(product_by_tiles(x, w.codes, w.scales, torch.float32, Tile(*tile)), found)


@pytest.mark.parametrize("processors", [1, 108, 132])
@pytest.mark.parametrize("rows", [1, 4096, 6144, 28672])
@pytest.mark.parametrize("groups", [1, 128, 448])
@pytest.mark.parametrize("count", [1, 9, 128])
def test_tiles_are_what_the_kernels_take(count: int, groups: int, rows: int, processors: int) -> None:
    from mxrot.kernels.fused.skinny import choose_tile

    tile = choose_tile(count, rows, groups, processors)
    assert tile.inputs % 8 == 0 and tile.rows % 16 == 0
    # A multiprocessor has 65,536 registers, and a tile that is left without a program to itself is not chosen.
    assert 32 * tile.warps * tile.registers <= 65536 and (tile.inputs < 16 or count > 8)


def test_every_code_at_every_place() -> None:
    """Exhaustive: each code of one side, at each place of a block, against 1; both ways."""
    ones = torch.full((32, 16), 0, dtype=torch.uint8)
    place = torch.arange(32)
    ones[place, place // 2] = torch.where(place % 2 == 0, 0x02, 0x20).to(torch.uint8)
    one = PackedRows(ones.to(DEVICE), torch.full((32, 1), 127, dtype=torch.uint8, device=DEVICE))
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    turned = torch.stack([codes.roll(turn) for turn in range(16)])
    scales = torch.full((16, 1), 127, dtype=torch.uint8, device=DEVICE)
    all_codes = PackedRows((turned[:, ::2] | turned[:, 1::2] << 4).to(DEVICE), scales)
    expected = torch.tensor(FORMAT.element.values)[turned.long()]
    assert torch.equal(product(one, all_codes).cpu(), expected.T)
    assert torch.equal(product(all_codes, one).cpu(), expected)


def test_every_scale() -> None:
    """Each from 2^-127 to 2^127, of either side."""
    codes = torch.full((255, 16), 0, dtype=torch.uint8, device=DEVICE)
    codes[:, 0] = 2
    every = PackedRows(codes, torch.arange(255, dtype=torch.uint8, device=DEVICE)[:, None])
    one = PackedRows(codes[:1], torch.full((1, 1), 127, dtype=torch.uint8, device=DEVICE))
    expected = torch.exp2(torch.arange(255) - 127.0)
    assert torch.equal(product(one, every)[0].cpu(), expected)
    for start in range(0, 255, 128):
        part = PackedRows(every.codes[start : start + 128], every.scales[start : start + 128])
        assert torch.equal(product(part, one)[:, 0].cpu(), expected[start : start + 128])


def test_a_sum_that_is_too_large() -> None:
    codes = torch.full((1, 16), ONES, dtype=torch.uint8, device=DEVICE)
    large = PackedRows(codes, torch.full((1, 1), 200, dtype=torch.uint8, device=DEVICE))
    assert product(large, large).item() == float("inf")


def test_a_scale_that_is_nan() -> None:
    x, w = packed(3, 64, 0), packed(5, 64, 1)
    x.scales[1, 1] = 255
    w.codes[3], w.scales[3, 0] = 0, 255
    expected = torch.zeros(3, 5, dtype=torch.bool, device=DEVICE)
    expected[1], expected[:, 3] = True, True
    assert torch.equal(product(x, w).isnan(), expected)


def test_blocks_of_zeros() -> None:
    x, w = packed(2, 64, 0), packed(3, 64, 1)
    w.codes[1], w.scales[1] = 0, 0
    x.codes[0] = 0
    found = product(x, w)
    assert not found[0].any() and not found[:, 1].any() and found[1, 0] != 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_leading_shapes_and_no_rows(dtype: torch.dtype) -> None:
    x, w = packed(6, 64, 0), packed(5, 64, 1)
    found = product(PackedRows(x.codes.view(2, 3, -1), x.scales.view(2, 3, -1)), w, dtype)
    assert found.shape == (2, 3, 5) and found.dtype == dtype
    # Triton's interpreter cuts float32 off instead of rounding it.
    torch.testing.assert_close(found.view(6, 5).float(), product(x, w), rtol=2.0**-7, atol=0)
    assert product(PackedRows(x.codes[:0], x.scales[:0]), w).shape == (0, 5)
