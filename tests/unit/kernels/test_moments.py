"""Second moments by bfloat16 parts against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.kernels import block_moments, outputs, plain, second_moment, weight_parts
from mxrot.kernels.dispatch import bfloat16_parts
from mxrot.kernels.plain import diagonal_blocks, moment_of_parts, plain_bfloat16_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float16, torch.bfloat16, torch.float32]
TWO_PARTS = [(dtype, scaled) for dtype in TYPES for scaled in (False, True) if scaled or dtype != torch.bfloat16]
UNIT = 2.0**-24

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def sample(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Channels of sizes from 2^-8 to 2^8, correlated, so that most sums have terms of one sign."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, 1, generator=generator)
    x = common + torch.randn(rows, columns, generator=generator)
    return (x * torch.logspace(-8, 8, columns, base=2)).to(dtype).to(DEVICE)


def factors_of(rows: int) -> Tensor:
    return (torch.rand(rows, 1, generator=torch.Generator().manual_seed(9)) * 8 + 0.01).to(DEVICE)


def exact(a: Tensor, b: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """a^T b in float64, and the sums of magnitudes."""
    a, b = a.double(), b.double()
    if size is not None:
        a = a * size.double().square()
    return a.T @ b, a.abs().T @ b.abs()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_held_exactly(dtype: torch.dtype) -> None:
    """Every finite number of the type."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)
    x = x.where(x.isfinite(), 0)
    parts = plain_bfloat16_parts(x)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().unflatten(1, (-1, 256)).sum(dim=1), x.double())


@pytest.mark.parametrize("factors", [None, factors_of(300)], ids=["plain", "scaled"])
def test_two_parts_hold_a_float32_to_16_bits(factors: Tensor | None) -> None:
    x = sample(300, 64, torch.float32)
    scaled = (x if factors is None else x * factors).double()
    held = plain_bfloat16_parts(x, factors).double().unflatten(1, (-1, 64)).sum(dim=1)
    assert ((held - scaled).abs() <= 2.0**-16 * scaled.abs()).all()
    assert ((held - scaled).abs() > 2.0**-18 * scaled.abs()).any()


@pytest.mark.parametrize(("dtype", "has_factors"), TWO_PARTS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (37, 96), (130, 160), (0, 32)])
def test_the_kernel_takes_apart_as_its_twin_does(
    dtype: torch.dtype, has_factors: bool, rows: int, columns: int
) -> None:
    """Compiled bit for bit; Triton's interpreter cuts off where hardware rounds, which leaves twice as much a part.

    Also for part of the channels, whose rows do not lie one behind the other.
    """
    from mxrot.kernels.fused.parts import two_bfloat16_parts

    whole = sample(rows, 2 * columns, dtype)
    factors = factors_of(rows) if has_factors else None
    for x in (whole, whole[:, columns // 2 :], whole.T.contiguous().T):
        found, expected = two_bfloat16_parts(x, factors), plain_bfloat16_parts(x, factors)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        if DEVICE == "cuda":
            assert torch.equal(found, expected)
        scaled = x.double() if factors is None else (x.float() * factors).double()
        held = found.double().unflatten(1, (2, x.shape[1])).sum(dim=1)
        assert ((held - scaled).abs() <= 2.0**-14 * scaled.abs()).all()


def test_what_is_not_finite_stays_so() -> None:
    from mxrot.kernels.fused.parts import two_bfloat16_parts

    x = sample(4, 32, torch.float32)
    x[1, :2] = torch.tensor([torch.inf, torch.nan])
    for split in (two_bfloat16_parts, plain_bfloat16_parts):
        is_finite = split(x).unflatten(1, (2, 32)).isfinite().all(dim=1)
        assert torch.equal(is_finite, x.isfinite())


@pytest.mark.parametrize("has_size", [False, True])
@pytest.mark.parametrize("types", [(a, b) for a in TYPES for b in TYPES], ids=str)
def test_the_moment_by_parts(
    types: tuple[torch.dtype, torch.dtype], has_size: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 100 rows and a rest: float32 sums of so many products, and what the parts of either side lose."""
    monkeypatch.setattr(plain.moments, "LEAST_CHUNK", 100)
    a, b = sample(810, 64, types[0]), sample(810, 32, types[1], seed=1)
    size = factors_of(810) if has_size else None
    left = plain_bfloat16_parts(a, None if size is None else size.square())
    found = moment_of_parts(left, plain_bfloat16_parts(b), 64, 32)
    expected, magnitudes = exact(a, b, size)
    chunk = 810 // 8 + 3
    assert found.dtype == torch.float64 and found.shape == (64, 32)
    assert ((found - expected).abs() <= (4 * chunk * UNIT + 2 * 2.0**-16 + 4 * UNIT) * magnitudes).all()


def test_chunks_and_parts_lose_less_than_a_float32_product() -> None:
    """Of positive numbers, where partial sums grow, than one float32 sum over all rows.

    How much less is the device's: matrix units cut products off where they are added, which all errs to one side.
    """
    x = sample(32768, 32, torch.float32).abs()
    expected, _ = exact(x, x)
    parts = plain_bfloat16_parts(x)
    ours = (moment_of_parts(parts, parts, 32, 32) - expected) / expected
    one_by_one = torch.zeros(32, 32, device=DEVICE)
    for row in x:
        one_by_one += row[:, None] * row
    assert ours.abs().max() < ((one_by_one - expected) / expected).abs().max()


@pytest.mark.parametrize("has_size", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_second_moment_of_the_device(dtype: torch.dtype, has_size: bool) -> None:
    a, b = sample(500, 96, dtype), sample(500, 64, torch.bfloat16, seed=1)
    size = factors_of(500) if has_size else None
    for left, right in ((a, b), (a, a)):
        expected, magnitudes = exact(left, right, size)
        found = second_moment(left, right, size)
        assert found.dtype == torch.float64
        assert ((found - expected).abs() <= (2 * 500 * UNIT + 2 * 2.0**-16 + 8 * UNIT) * magnitudes).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_blocks_on_the_diagonal(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 96 channels, 64 of which are taken together on a GPU."""
    monkeypatch.setattr("mxrot.kernels.dispatch.MOMENT_CHANNELS", 64)
    x = sample(300, 96, dtype)
    expected, magnitudes = (diagonal_blocks(matrix, 32) for matrix in exact(x, x))
    found = block_moments(x, 32)
    assert found.shape == (3, 32, 32)
    assert torch.equal(expected[2], exact(x, x)[0][64:, 64:])
    assert ((found - expected).abs() <= (2 * 300 * UNIT + 2 * 2.0**-16) * magnitudes).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("is_exact", [False, True])
def test_outputs_of_weights_that_need_more_than_one_number(dtype: torch.dtype, is_exact: bool) -> None:
    x = sample(200, 96, dtype)
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(3)).double().to(DEVICE)
    weight = weight.to(dtype).double() if is_exact else weight
    parts = weight_parts(weight, dtype)
    assert len(parts) == (96 if DEVICE == "cuda" and dtype != torch.float32 and not is_exact else 48)
    found = outputs(x, parts, 48)
    expected, magnitudes = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= (96 * 2 * UNIT + 2.0**-16) * magnitudes).all()


def test_parts_are_taken_where_they_are_needed() -> None:
    x = sample(10, 32, torch.bfloat16)
    assert bfloat16_parts(x) is x
    assert bfloat16_parts(x, factors_of(10)).shape == (10, 64)
