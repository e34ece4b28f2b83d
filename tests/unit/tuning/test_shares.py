"""What processes take of a step: all of it together, evenly, each window in its turn."""

from __future__ import annotations

import pytest
import torch

from mxrot.calibration.world import OneProcess
from mxrot.errors import DataError
from mxrot.tuning.shares import average, own_count, own_split, split_windows, step_shares, window_batches


class Told(OneProcess):
    """One of several processes, of which this many windows are known."""

    def __init__(self, rank: int, counts: list[int]) -> None:
        self.rank, self.size, self.counts = rank, len(counts), counts  # type: ignore[misc]

    def count(self, count: int) -> int:
        return sum(self.counts)

    def before(self, count: int) -> int:
        return sum(self.counts[: self.rank])

    def gather(self, tensor: torch.Tensor | None) -> list[torch.Tensor]:
        return [torch.tensor([count]) for count in self.counts]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 4, 8, 100])
def test_parts_of_a_batch_are_that_of_one_process(size: int, batch: int) -> None:
    windows = torch.arange(20)
    whole = list(window_batches(windows, batch, 30, generator()))
    parts = [list(step_shares(windows, batch, 30, generator(), Told(rank, [20] * size), False)) for rank in range(size)]
    for step, expected in enumerate(whole):
        shares = [part[step] for part in parts]
        assert torch.equal(torch.cat([share.windows for share in shares]), expected)
        assert [share.share for share in shares] == [len(share.windows) / len(expected) for share in shares]
        assert max(len(share.windows) for share in shares) <= -(-len(expected) // size)


@pytest.mark.parametrize("counts", [[7, 7], [7, 6, 7], [4, 0, 5], [1, 3], [9]])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_each_process_takes_as_many_of_its_own(counts: list[int], batch: int) -> None:
    """Together those of a batch; each its windows in turn, and as often as the others, but for one."""
    steps, whole = 40, min(batch, sum(counts))
    taken = []
    for rank, count in enumerate(counts):
        shares = list(step_shares(torch.arange(count), batch, steps, generator(), Told(rank, counts), True))
        assert [share.share for share in shares] == [len(share.windows) / whole for share in shares]
        seen = torch.cat([share.windows for share in shares])
        often = torch.bincount(seen, minlength=count)
        assert not count or int(often.max() - often.min()) <= 1
        taken.append([len(share.windows) for share in shares])
    assert [sum(step) for step in zip(*taken, strict=True)] == [whole] * steps
    totals = [sum(own) for own, count in zip(taken, counts, strict=True) if count]
    assert max(totals) - min(totals) <= 1
    assert all(sum(own) == 0 for own, count in zip(taken, counts, strict=True) if not count)


def test_what_is_left_over_goes_round() -> None:
    assert [[own_count([5, 5, 5], 4, step, rank) for rank in range(3)] for step in range(4)] == [
        [2, 1, 1],
        [1, 2, 1],
        [1, 1, 2],
        [2, 1, 1],
    ]
    assert [[own_count([5, 5], 1, step, rank) for rank in range(2)] for step in range(3)] == [[1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("counts", [[10], [5, 5], [3, 4, 3], [1, 9]])
def test_what_is_held_out_is_that_of_one_process(counts: list[int]) -> None:
    train, test = split_windows(10, 0.3)
    found: tuple[list[int], list[int]] = ([], [])
    for rank, own in enumerate(counts):
        before = sum(counts[:rank])
        *parts, count = own_split(own, 0.3, Told(rank, counts))
        assert count == len(test)
        for all_of_them, part in zip(found, parts, strict=True):
            all_of_them += [before + place for place in part]
    assert found == (train.tolist(), test.tolist())


def test_one_window_of_all_processes_cannot_be_split() -> None:
    with pytest.raises(DataError, match="it needs 2, and calibration has 1"):
        own_split(1, 0.1, Told(0, [1, 0]))


def test_one_process_keeps_its_gradients() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert average([parameter], 0.25, 1.0, OneProcess()) == 0.25 and parameter.grad is None
