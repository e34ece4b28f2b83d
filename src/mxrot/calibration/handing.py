"""Send the tokens that several processes have for the same module to one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxrot.calibration.executor import Executor
from mxrot.calibration.world import World


def handed_out(executors: Sequence[Executor], world: World) -> Executor:
    """The executor of this rank, with the batches of all processes, by rank.

    `executors` are as many as there are processes, and the same in all of them. The result has no world: it runs by
    itself. Each runs a module on its own batches [1, tokens, H]. The sums over them equal those of one process with all
    windows, to the last bit if each process ends with a whole batch of it.
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
    """For each executor the width of its tokens and their number by batch, padded with zeros: int64."""
    found = torch.zeros(len(executors), 1 + max(len(one.batches) for one in executors), dtype=torch.int64)
    for row, executor in zip(found, executors, strict=True):
        for index in executor.batches:
            row[0], row[1 + index] = executor.hidden(index).shape[-1], executor.hidden(index).shape[1]
    return found


def _rows(executor: Executor, width: int, world: World) -> Tensor:
    """All tokens [tokens, H] of this process."""
    own = [executor.hidden(index)[0] for index in executor.batches]
    return torch.cat(own) if own else torch.empty(0, width, dtype=executor.dtype, device=world.device)
