"""Integers by weights that are looked up: the kernel against the plain twin, float64 and every code at every place."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mxrot.formats import pack_codes
from mxrot.kernels.plain import IntegerRows, in_planes, looked_up, out_of_planes, plain_look_up_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Weights:
    packed: Tensor
    scales: Tensor
    levels: Tensor

    @classmethod
    def of(cls, rows: int, columns: int, group: int, seed: int, exact: bool = False) -> Weights:
        """Random; with `exact` scales of powers of two, so that no float32 sum is rounded."""
        generator = torch.Generator().manual_seed(seed)
        groups = columns // group
        codes = torch.randint(0, 4, (rows, columns), generator=generator).to(torch.uint8)
        scales = torch.exp(torch.randn(rows, groups, generator=generator) - 5)
        scales = torch.exp2(scales.log2().floor().clamp(-10, -4)) if exact else scales
        levels = torch.randint(-127, 128, (rows, groups, 4), generator=generator).to(torch.int8)
        return cls(pack_codes(codes, 2).to(DEVICE), scales.half().to(DEVICE), levels.to(DEVICE))

    def values(self) -> Tensor:
        """float64 [N, K]."""
        return (looked_up(self.packed, self.levels).double() * self.scales.double()[..., None]).flatten(1)


def inputs(rows: int, columns: int, seed: int, largest: int = 7) -> IntegerRows:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-largest, largest + 1, (rows, columns), generator=generator).to(torch.int8)
    return IntegerRows(codes.to(DEVICE), torch.exp2(torch.randn(rows, 1, generator=generator).round()).to(DEVICE))


def planes(x: IntegerRows) -> IntegerRows:
    return IntegerRows(in_planes(x.codes), x.scales)


def product(x: IntegerRows, w: Weights, dtype: torch.dtype = torch.float32) -> Tensor:
    from mxrot.kernels.fused.look_up import look_up_product

    return look_up_product(planes(x), w.packed, w.scales, w.levels, dtype)


def plain(x: IntegerRows, w: Weights) -> Tensor:
    return plain_look_up_product(x, w.packed, w.scales, w.levels, torch.float32)


def assert_is_product(found: Tensor, x: IntegerRows, w: Weights) -> None:
    """Groups are exact; of each a product and a sum are rounded, and the product with the scale of the row."""
    a, b = x.codes.double() * x.scales.double(), w.values()
    # A group may be summed in parts: in as many as 16 weights make one.
    exact, bound = a @ b.mT, (a.shape[-1] / 16 + 2) * 2.0**-24 * (a.abs() @ b.abs().mT)
    assert found.shape == exact.shape and ((found.double() - exact).abs() <= bound).all()


def test_the_order_of_inputs() -> None:
    x = torch.arange(96).view(2, 48)
    found = in_planes(x)
    assert found[0].view(4, 3, 4)[:, 0].tolist() == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    assert found[0].view(4, 3, 4)[0].tolist() == [[0, 2, 4, 6], [16, 18, 20, 22], [32, 34, 36, 38]]
    assert torch.equal(out_of_planes(found), x) and torch.equal(in_planes(x[1]), found[1])


@pytest.mark.parametrize(
    ("count", "rows", "columns", "group"),
    [
        (1, 1, 16, 16),
        (1, 17, 384, 128),
        (2, 5, 128, 64),
        (3, 11, 288, 96),
        (8, 9, 576, 192),
        (10, 11, 288, 96),
    ],
)
def test_it_is_the_product(count: int, rows: int, columns: int, group: int) -> None:
    x, w = inputs(count, columns, 0), Weights.of(rows, columns, group, 1)
    assert_is_product(product(x, w), x, w)
    assert_is_product(plain(x, w), x, w)


@pytest.mark.parametrize(
    ("tile", "columns", "group"),
    [
        ((1, 1, 1), 2176, 128),
        ((2, 2, 1), 1152, 96),
        ((4, 1, 2, 1), 2112, 192),
        ((1, 1, 4), 1152, 96),
        ((2, 2, 2, 0), 2176, 128),
        ((1, 4, 1, 1), 2112, 192),
    ],
)
def test_every_kind_of_tile_gives_the_bits_of_the_twin(tile: tuple[int, ...], columns: int, group: int) -> None:
    """Where no sum is rounded, its order changes nothing."""
    from mxrot.kernels.fused.look_up import Tile, product_by_tiles

    x, w = inputs(2, columns, 0), Weights.of(5, columns, group, 1, exact=True)
    found = product_by_tiles(planes(x), w.packed, w.scales, w.levels, torch.float32, Tile(*tile), DEVICE == "cuda")
    assert torch.equal(found, plain(x, w))


def test_the_largest_integers() -> None:
    """Inputs of 8 bits: the product of a group does not overflow, and is exact."""
    x, w = inputs(2, 384, 0, largest=127), Weights.of(6, 384, 192, 1, exact=True)
    x.codes[0], w.levels[:3] = -127, -127
    assert product(x, w)[0, 0] == (127 * 127 * 192 * w.scales[0].double().sum() * x.scales[0].double()).item()
    assert torch.equal(product(x, w), plain(x, w))


def test_every_code_at_every_place() -> None:
    """Exhaustive: each code at each place of what a thread takes, all other places with another code, of level 0."""
    place = torch.arange(64).repeat(4)
    code = torch.arange(4).repeat_interleave(64)
    row = torch.arange(256)
    other = (code + 1) % 4
    codes = other[:, None].repeat(1, 64)
    codes[row, place] = code
    levels = torch.tensor([-128, -1, 3, 127], dtype=torch.int8).repeat(256, 1)
    levels[row, other] = 0
    w = Weights(
        pack_codes(codes.to(torch.uint8), 2).to(DEVICE),
        torch.ones(256, 1).half().to(DEVICE),
        levels[:, None].to(DEVICE),
    )
    x = IntegerRows(torch.arange(-63, 65, 2, dtype=torch.int8)[None].to(DEVICE), torch.ones(1, 1).to(DEVICE))
    expected = (levels[row, code].int() * x.codes.cpu()[0, place]).float()
    assert torch.equal(product(x, w).cpu()[0], expected) and torch.equal(plain(x, w).cpu()[0], expected)


def test_types_leading_shapes_and_no_rows() -> None:
    x, w = inputs(6, 256, 0), Weights.of(5, 256, 128, 1)
    folded = IntegerRows(x.codes.view(2, 3, -1), x.scales.view(2, 3, 1))
    found = product(folded, w, torch.bfloat16)
    assert found.shape == (2, 3, 5) and found.dtype == torch.bfloat16
    # Triton's interpreter cuts float32 off instead of rounding it.
    torch.testing.assert_close(found.view(6, 5).float(), product(x, w), rtol=2.0**-7, atol=0)
    assert plain_look_up_product(folded, w.packed, w.scales, w.levels, torch.float32).shape == (2, 3, 5)
    assert product(IntegerRows(x.codes[:0], x.scales[:0]), w).shape == (0, 5)


def test_a_row_that_is_nan() -> None:
    x, w = inputs(2, 128, 0), Weights.of(5, 128, 128, 1)
    x.scales[1] = float("nan")
    assert product(x, w)[0].isfinite().all() and product(x, w)[1].isnan().all() and plain(x, w)[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("columns", "group"), [(1024, 128), (576, 96), (960, 192)])
def test_instructions_are_the_arithmetic(columns: int, group: int) -> None:
    """PRMT and DP4A against shifts and products: the same tile, so the same sums, bit for bit."""
    from mxrot.kernels.fused.look_up import Tile, product_by_tiles

    x, w = inputs(2, columns, 0, largest=127), Weights.of(70, columns, group, 1)
    by, arithmetic = (
        product_by_tiles(planes(x), w.packed, w.scales, w.levels, torch.float32, Tile(2, 2, 1, 1), has_assembly)
        for has_assembly in (True, False)
    )
    assert torch.equal(by, arithmetic)
    assert_is_product(by, x, w)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 16391, 4096), (1, 333, 14336), (20, 1001, 4096)])
def test_wide_weights_on_a_gpu(count: int, rows: int, columns: int) -> None:
    x, w = inputs(count, columns, 0), Weights.of(rows, columns, 128, 1, exact=True)
    found = product(x, w)
    assert torch.equal(found, plain(x, w)) and torch.equal(product(x, w), found)
