"""Tokens that several processes have of the same module, handed to one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxrot.calibration.executor import Executor
from mxrot.calibration.world import World


def handed_out(executors: Sequence[Executor], world: World) -> Executor:
    """Of executors, as many as there are processes and the same in all of them, the one of this rank, with the batches
    of all processes, by rank, and without a world: it runs by itself.

    Each runs a module on batches [1, tokens, H] of its own. The sums over them are those of one process with all
    windows, to the last bit where each process ends with a batch of it.
    """
    told = world.gather(_described(executors))
    found = None
    for rank, executor in enumerate(executors):
        width = int(max(one[rank, 0] for one in told))
        counts = [[count for count in one[rank, 1:].tolist() if count] for one in told]
        rows = world.handed_to(rank, _rows(executor, width, world), [sum(own) for own in counts])
        if rows is not None:
            batches = [x[None] for given, own in zip(rows, counts, strict=True) for x in given.split(own)]
            found = executor.by_itself(batches)
    assert found is not None
    return found


def _described(executors: Sequence[Executor]) -> Tensor:
    """Of each, the width of its tokens and how many there are by batch, zeros behind them: int64."""
    found = torch.zeros(len(executors), 1 + max(len(one.batches) for one in executors), dtype=torch.int64)
    for row, executor in zip(found, executors, strict=True):
        for index in executor.batches:
            row[0], row[1 + index] = executor.hidden(index).shape[-1], executor.hidden(index).shape[1]
    return found


def _rows(executor: Executor, width: int, world: World) -> Tensor:
    """All tokens [tokens, H] of this process."""
    own = [executor.hidden(index)[0] for index in executor.batches]
    return torch.cat(own) if own else torch.empty(0, width, dtype=executor.dtype, device=world.device)
