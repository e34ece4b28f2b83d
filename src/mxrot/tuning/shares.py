"""The shares of several processes in the windows for tuning, and the sum of their gradients.

If all have the same windows, a batch is that of one process, and each takes a part of it. If each has its own windows,
as for a block, whose inputs lie where they were computed, a batch takes as nearly as possible the same number from each
process. The rest goes to the processes in turn, and a process has none in a step of fewer windows than processes. A
process uses all of its windows before any is repeated.

Gradients are summed, each times its process's share of the step's windows; all windows have the same length. The extra
feature of torch's DistributedDataParallel, exchange during the backward pass, does not fit: the loss has several
backward passes, a step is recorded, and a process may have no window in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxrot.calibration import World
from mxrot.errors import DataError


@dataclass(frozen=True)
class StepShare:
    """The windows of a process in one step."""

    windows: Tensor
    """Their positions, int64 [n]; may be empty."""
    share: float
    """Their share of all windows of the step."""


def split_windows(windows: int, held_out: float) -> tuple[Tensor, Tensor]:
    """The positions to train on, and evenly spaced ones that are held out, int64. DataError if either is empty."""
    if windows < 2:
        raise DataError(f"tuning holds out windows: it needs 2, and calibration has {windows}")
    count = min(max(1, round(windows * held_out)), windows - 1)
    test = torch.arange(count) * windows // count
    is_held_out = torch.zeros(windows, dtype=torch.bool)
    is_held_out[test] = True
    return (~is_held_out).nonzero().flatten(), test


def own_split(own: int, held_out: float, world: World) -> tuple[list[int], list[int], int]:
    """`split_windows` of the windows of all processes, process after process, of which this one has `own`.

    Returns the positions among its own windows, and how many all processes hold out.
    """
    before = world.before(own)
    train, test = split_windows(world.count(own), held_out)
    mine = [[place - before for place in part.tolist() if 0 <= place - before < own] for part in (train, test)]
    return mine[0], mine[1], len(test)


def at_once(batch_windows: int, world: World) -> int:
    """The most windows of a batch that pass through one process."""
    return -(-batch_windows // world.size)


def step_shares(
    windows: Tensor, size: int, steps: int, generator: torch.Generator, world: World, are_own: bool
) -> Iterator[StepShare]:
    """The share of this process in each step. All processes take `size` windows together.

    `windows` are the positions to train on. With `are_own` they are this process's alone.
    """
    if world.size == 1 or not are_own:
        for batch in window_batches(windows, size, steps, generator):
            own = batch.tensor_split(world.size)[world.rank]
            yield StepShare(own, len(own) / len(batch))
        return
    there = [int(count) for count in world.gather(torch.tensor([len(windows)]))]
    counts = [own_count(there, min(size, sum(there)), step, world.rank) for step in range(steps)]
    for own in _in_turn(windows, counts, generator):
        yield StepShare(own, len(own) / min(size, sum(there)))


def own_count(there: Sequence[int], size: int, step: int, rank: int) -> int:
    """How many of the `size` windows of a step this rank takes, with `there` windows by rank."""
    able = [other for other, count in enumerate(there) if count]
    if rank not in able:
        return 0
    each, left = divmod(size, len(able))
    return each + ((able.index(rank) - step * left) % len(able) < left)


def window_batches(windows: Tensor, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The positions of `size` windows for each step. Each of `windows` is used once before any is repeated."""
    return _in_turn(windows, [min(size, len(windows))] * steps, generator)


def _in_turn(windows: Tensor, counts: Iterable[int], generator: torch.Generator) -> Iterator[Tensor]:
    left = torch.empty(0, dtype=torch.int64)
    for count in counts:
        while len(left) < count:
            left = torch.cat([left, windows[torch.randperm(len(windows), generator=generator)]])
        yield left[:count]
        left = left[count:]


@torch.no_grad()
def average(parameters: Sequence[nn.Parameter], loss: float, share: float, world: World) -> float:
    """Average gradients and losses over all windows of a step; every process gets the same bits.

    This process's gradients are those of the mean `loss` over its `share` of the windows. Returns the loss over all.
    """
    if world.size == 1:
        return loss
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad.mul_(share))
    mean = gradients[0].new_tensor(loss * share)
    world.add_up([mean, *gradients])
    return float(mean)
