"""What each of several processes takes of the windows that are tuned on, and how their gradients become one.

Where all have the same windows, a batch is that of one process, and each takes a part of it. Where each has windows of
its own, as for a block, whose inputs lie where they were computed, a batch has as many of each process, as nearly as it
goes: what is left over goes round, and a process has none in a step of fewer windows than processes. A process goes
through all of its windows before any comes again.

Gradients are summed, each times the share of the step's windows that it is a mean over; all windows are as long. What
torch's DistributedDataParallel has beyond that, exchange during the backward pass, does not fit: the loss is of several
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
    """What a process takes of the windows of a step."""

    windows: Tensor
    """Their positions, int64 [n]; there may be none."""
    share: float
    """Of all windows of the step."""


def split_windows(windows: int, held_out: float) -> tuple[Tensor, Tensor]:
    """Positions to train on, and evenly spaced ones that are held out, int64; DataError unless both are some."""
    if windows < 2:
        raise DataError(f"tuning holds out windows: it needs 2, and calibration has {windows}")
    count = min(max(1, round(windows * held_out)), windows - 1)
    test = torch.arange(count) * windows // count
    is_held_out = torch.zeros(windows, dtype=torch.bool)
    is_held_out[test] = True
    return (~is_held_out).nonzero().flatten(), test


def own_split(own: int, held_out: float, world: World) -> tuple[list[int], list[int], int]:
    """`split_windows` of the windows of all processes, of which this one has `own`, one process behind the other: its
    positions among its own, and how many all hold out."""
    before = world.before(own)
    train, test = split_windows(world.count(own), held_out)
    mine = [[place - before for place in part.tolist() if 0 <= place - before < own] for part in (train, test)]
    return mine[0], mine[1], len(test)


def at_once(batch_windows: int, world: World) -> int:
    """The most windows of a batch that pass through a process."""
    return -(-batch_windows // world.size)


def step_shares(
    windows: Tensor, size: int, steps: int, generator: torch.Generator, world: World, are_own: bool
) -> Iterator[StepShare]:
    """What this process takes in each step, in which all take `size` windows together.

    `windows` are positions of those to train on: `are_own` says whether they are this process's alone.
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
    """How many of the `size` windows of a step the process of this rank takes, where so many are `there` by rank."""
    able = [other for other, count in enumerate(there) if count]
    if rank not in able:
        return 0
    each, left = divmod(size, len(able))
    return each + ((able.index(rank) - step * left) % len(able) < left)


def window_batches(windows: Tensor, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """For each step the positions of its windows, `size` of them; each of `windows` once before any comes again."""
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
    """Let gradients of the mean loss over a `share` of a step's windows, on which it is `loss`, be those over all; the
    loss over all. Every process has the same bits."""
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
