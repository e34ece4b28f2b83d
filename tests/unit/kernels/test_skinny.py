"""Some rows of E5M2 times packed MXFP4 weights: against the plain twin, float64, every code, scale and E5M2 number."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format
from mxrot.kernels.plain import (
    PackedRows,
    in_pairs,
    lift_exponents,
    out_of_pairs,
    plain_paired_product,
    plain_rotate_quantize_e5m2,
    plain_rotate_quantize_packed,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@dataclass(frozen=True)
class Weights:
    codes: Tensor
    scales: Tensor
    exponents: Tensor

    @classmethod
    def of(cls, packed: PackedRows, together: bool = False) -> Weights:
        exponents, outside = lift_exponents(packed.codes, packed.scales, together)
        assert not int(outside)
        return cls(packed.codes.to(DEVICE), packed.scales.to(DEVICE), exponents.to(DEVICE))

    def values(self) -> Tensor:
        scales = BlockScales(self.scales, FORMAT.scale)
        return QTensor.from_packed(self.codes, scales, FORMAT).dequantize(torch.float64)


def weights(rows: int, columns: int, seed: int, together: bool = False) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))
    return Weights.of(plain_rotate_quantize_packed(w, None, FORMAT, FORMAT.rule()), together)


def inputs(rows: int, columns: int, seed: int) -> Tensor:
    """E5M2, in the order of columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(2 * torch.randn(rows, columns, generator=generator))
    return plain_rotate_quantize_e5m2(x, None, FORMAT, FORMAT.rule()).to(DEVICE)


def paired(x: Tensor) -> Tensor:
    return in_pairs(x.view(torch.uint8)).view(x.dtype)


def product(x: Tensor, w: Weights, dtype: torch.dtype = torch.float32) -> Tensor:
    from mxrot.kernels.fused.skinny import skinny_product

    return skinny_product(paired(x), w.codes, w.scales, w.exponents, dtype)


def assert_is_product(found: Tensor, x: Tensor, w: Weights) -> None:
    """Products are exact in float32; a sum of K of them, in any order, is off by K 2^-24 of their magnitudes at most,
    twice that where matrix hardware cuts sums off instead of rounding them."""
    a, b = x.double(), w.values()
    exact, bound = a @ b.mT, a.shape[-1] * 2.0**-23 * (a.abs() @ b.abs().mT)
    assert found.shape == exact.shape and ((found.double() - exact).abs() <= bound).all()


def test_the_order_of_inputs() -> None:
    x = torch.arange(128).view(2, 64)
    found = in_pairs(x)
    assert found[0, :32].tolist()[:8] == [0, 1, 4, 5, 8, 9, 12, 13]
    assert found[0, 16:24].tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    assert torch.equal(out_of_pairs(found), x) and torch.equal(in_pairs(x[1]), found[1])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16, 17, 33, 128])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (37, 96), (100, 1120)])
def test_it_is_the_product(count: int, rows: int, columns: int) -> None:
    x, w = inputs(count, columns, 0), weights(rows, columns, 1)
    assert_is_product(product(x, w), x, w)
    assert_is_product(plain_paired_product(paired(x), w.codes, w.scales, w.exponents, torch.float32), x, w)


@pytest.mark.parametrize("together", [False, True])
def test_a_width_that_steps_divide(together: bool) -> None:
    x, w = inputs(3, 4096, 0), weights(40, 4096, 1, together)
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

    x, w = inputs(11, columns, 0), weights(70, columns, 1)
    found, again = (
        product_by_tiles(paired(x), w.codes, w.scales, w.exponents, torch.float32, Tile(*tile)) for _ in range(2)
    )
    assert_is_product(found, x, w)
    assert torch.equal(again, found)


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
    """Exhaustive: each code, at each place of a block, against 1."""
    ones = torch.eye(32).to(torch.float8_e5m2).to(DEVICE)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    turned = torch.stack([codes.roll(turn) for turn in range(16)])
    scales = torch.full((16, 1), 127, dtype=torch.uint8)
    w = Weights.of(PackedRows(turned[:, ::2] | turned[:, 1::2] << 4, scales))
    expected = torch.tensor(FORMAT.element.values)[turned.long()]
    assert torch.equal(product(ones, w).cpu(), expected.T)


def test_every_input_at_every_place() -> None:
    """Exhaustive: each finite E5M2 number, at each place of a block, against 1."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)
    numbers = numbers[numbers.float().isfinite()].view(torch.uint8)
    numbers = numbers[: len(numbers) // 8 * 8].view(-1, 8).repeat(1, 4).to(DEVICE)  # each eight four times a block
    codes = torch.zeros(32, 16, dtype=torch.uint8)
    place = torch.arange(32)
    codes[place, place // 2] = torch.where(place % 2 == 0, 0x02, 0x20).to(torch.uint8)
    w = Weights.of(PackedRows(codes, torch.full((32, 1), 127, dtype=torch.uint8)))
    for shift in range(8):
        x = numbers.roll(shift, dims=1).contiguous().view(torch.float8_e5m2)
        assert torch.equal(product(x, w), x.float())


@pytest.mark.parametrize("below", range(15))
def test_every_scale(below: int) -> None:
    """All from 2^-112 to 2^127 that a row can have, in a block `below` its largest one. A block of zeros beside may
    have any."""
    bytes_ = torch.arange(15, 254)
    codes = torch.zeros(len(bytes_), 48, dtype=torch.uint8)
    codes[:, 0], codes[:, 16] = 0x72, 0x91
    scales = torch.stack([bytes_, bytes_ - below, bytes_.flip(0)], dim=1).to(torch.uint8)
    w = Weights.of(PackedRows(codes, scales))
    x = torch.zeros(4, 96)
    x[0, 0], x[1, 1], x[2, 32], x[3, 33] = 1, 1, 1, 1
    expected = torch.exp2(bytes_ - 127.0) * torch.tensor([1.0, 6.0, 0.5 * 2.0**-below, -0.5 * 2.0**-below])[:, None]
    assert torch.equal(product(x.to(torch.float8_e5m2).to(DEVICE), w).cpu(), expected)


def test_a_sum_that_is_too_large() -> None:
    w = Weights.of(PackedRows(torch.full((1, 16), 0x77, dtype=torch.uint8), torch.full((1, 1), 253, dtype=torch.uint8)))
    assert product(torch.full((1, 32), 6.0).to(torch.float8_e5m2).to(DEVICE), w).item() == float("inf")


def test_inputs_that_are_nan_or_infinite() -> None:
    x, w = inputs(3, 64, 0), weights(5, 64, 1)
    values = x.float()
    values[1, 40], values[2, 3] = float("nan"), float("inf")
    found = product(values.to(torch.float8_e5m2), w)
    assert found[0].isfinite().all() and found[1].isnan().all() and not found[2].isfinite().any()


def test_blocks_of_zeros() -> None:
    x, w = inputs(2, 64, 0), weights(3, 64, 1)
    w.codes[1], w.scales[1] = 0, 0
    x.view(torch.uint8)[0] = 0
    found = product(x, w)
    assert not found[0].any() and not found[:, 1].any() and found[1, 0] != 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_leading_shapes_and_no_rows(dtype: torch.dtype) -> None:
    x, w = inputs(6, 64, 0), weights(5, 64, 1)
    found = product(x.view(2, 3, -1), w, dtype)
    assert found.shape == (2, 3, 5) and found.dtype == dtype
    # Triton's interpreter cuts float32 off instead of rounding it.
    torch.testing.assert_close(found.view(6, 5).float(), product(x, w), rtol=2.0**-7, atol=0)
    assert product(x[:0], w).shape == (0, 5)
