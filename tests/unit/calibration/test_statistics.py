"""Each collector against one computation over all batches at once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mxrot.calibration import ChannelMaxima, Hessian, LargestMagnitude, RowSample
from mxrot.calibration.statistics import COLLECTORS, Collector, MeanWindow, PeakBlocks, SpacedBlocks

BLOCK, GROUPS = 8, 3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """[windows, tokens, K]; the last batch is smaller."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, BLOCK * GROUPS), (2, 5, BLOCK * GROUPS), (1, 5, BLOCK * GROUPS)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def collected(collector: Collector, seen: list[Tensor]) -> Tensor:
    for batch in seen:
        collector.update(batch)
    return collector.result()


def rows_of(seen: list[Tensor]) -> np.ndarray:
    """All tokens [T, K] in float64."""
    return torch.cat([batch.flatten(0, 1) for batch in seen]).double().numpy()


@DTYPES
def test_channel_maxima(dtype: torch.dtype) -> None:
    seen = batches(dtype)
    got = collected(ChannelMaxima(), seen)
    assert got.dtype == torch.float32
    assert np.array_equal(got.double().numpy(), np.abs(rows_of(seen)).max(axis=0))


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_nan_stays_in_its_channel(batch: int) -> None:
    seen = batches()
    seen[batch][0, 3, 5] = torch.nan
    got = collected(ChannelMaxima(), seen)
    assert got.isnan().nonzero().tolist() == [[5]]
    seen[batch][0, 3, 5] = -torch.inf
    assert collected(ChannelMaxima(), seen)[5] == torch.inf


@DTYPES
@pytest.mark.parametrize("rows", [1, 4, 10, 11, 25, 100])
def test_peak_blocks_are_the_global_largest_of_each_block(rows: int, dtype: torch.dtype) -> None:
    """25 tokens in batches of 10, 10 and 5; compared by peaks, as bfloat16 has equal ones."""
    seen = batches(dtype)
    got = collected(PeakBlocks(BLOCK, rows), seen)
    kept = min(rows, 25)
    assert got.shape == (GROUPS, kept, BLOCK) and got.dtype == torch.float32
    blocks = rows_of(seen).reshape(25, GROUPS, BLOCK).transpose(1, 0, 2)
    for mine, block in zip(got.double().numpy(), blocks, strict=True):
        peaks = np.sort(np.abs(block).max(axis=1))[::-1]
        assert np.array_equal(np.abs(mine).max(axis=1), peaks[:kept])
        tokens = {tuple(row) for row in block}
        assert all(tuple(row) in tokens for row in mine) and len({tuple(row) for row in mine}) == kept


def test_the_mean_window() -> None:
    """Over 5 windows, token by token; float32 sums of 5 numbers and one division."""
    seen = batches()
    got = collected(MeanWindow(), seen)
    assert got.dtype == torch.float32 and got.shape == (5, BLOCK * GROUPS)
    windows = torch.cat(seen).double()
    bound = 6 * 2.0**-24 * windows.abs().sum(0) / 5
    assert ((got.double() - windows.mean(0)).abs() <= bound).all()


@DTYPES
def test_the_hessian_is_a_mean_over_tokens(dtype: torch.dtype) -> None:
    """Batches of different size count by their tokens; a product of one batch is a float32 sum of at most 10."""
    seen = batches(dtype)
    got = collected(Hessian(), seen)
    assert got.dtype == torch.float64 and torch.equal(got, got.T)
    rows = rows_of(seen)
    bound = 11 * 2.0**-24 * (np.abs(rows).T @ np.abs(rows)) / 25
    assert (np.abs(got.numpy() - rows.T @ rows / 25) <= bound).all()


def test_the_hessian_can_be_asked_for_along_the_way() -> None:
    seen = batches()
    collector = Hessian()
    collector.update(seen[0])
    first = collector.result()
    assert torch.equal(collector.result(), first)
    collector.update(seen[1])
    assert torch.equal(collector.result(), collected(Hessian(), seen[:2]))
    assert torch.equal(first, collected(Hessian(), seen[:1]))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(10, range(10)), (100, range(10)), (5, range(0, 10, 2)), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (1, [0])],
)
def test_the_row_sample_is_of_the_first_batch_alone(rows: int, expected: list[int]) -> None:
    seen = batches(torch.bfloat16)
    got = collected(RowSample(rows), seen)
    assert got.dtype == torch.float32
    assert torch.equal(got, seen[0].flatten(0, 1)[list(expected)].float())


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7, 100])
def test_spaced_blocks_do_not_depend_on_the_batches(stride: int) -> None:
    seen = batches()
    tokens = torch.cat([batch.flatten(0, 1) for batch in seen])
    got = collected(SpacedBlocks(BLOCK, rows=1, tokens=stride), seen)
    assert torch.equal(got.transpose(0, 1).flatten(1), tokens[::stride].float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_largest_magnitude_shows_what_is_not_finite(bad: float) -> None:
    seen = batches(torch.bfloat16)
    assert collected(LargestMagnitude(), seen) == max(batch.abs().amax().float() for batch in seen)
    seen[0][0, 0, 3] = bad
    got = collected(LargestMagnitude(), seen)
    assert got.isnan() if bad != bad else got == torch.inf


@pytest.mark.parametrize("name", COLLECTORS)
def test_every_collector_can_be_made_by_name(name: str) -> None:
    result = collected(COLLECTORS[name](BLOCK, 4, 10), batches(torch.bfloat16))
    assert result.dtype in (torch.float32, torch.float64) and result.isfinite().all()


def test_batches_are_left_as_they_were() -> None:
    """A collector adds up in place; what it was shown must not be that place."""
    seen, before = batches(), batches()
    for collector in (ChannelMaxima(), PeakBlocks(BLOCK, 3), MeanWindow(), Hessian(), RowSample(3)):
        collected(collector, seen)
    assert all(torch.equal(one, two) for one, two in zip(seen, before, strict=True))
