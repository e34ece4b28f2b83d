"""The work that the processes of a search share: measurements, and sites rounded in other ways. One process does each
piece whole, so its bits are those of a single process. All get every result, and take the same next step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from mxrot.calibration import World
from mxrot.errors import NumericsError


def figures_of(tasks: Sequence[Callable[[], list[float]]], world: World) -> list[list[float]]:
    """The result of each task, in all processes. One process runs each task, and as many run at a time as there are
    processes.

    With several processes, a task that raises NumericsError gives [NaN], because others wait for it. In one process it
    raises.
    """
    if world.size == 1:
        return [task() for task in tasks]
    found: list[list[float]] = []
    for start in range(0, len(tasks), world.size):
        own = tasks[start : start + world.size][world.rank : world.rank + 1]
        given = world.gather(torch.tensor(_figures(own[0]), dtype=torch.float64) if own else None)
        found += [figures.tolist() for figures in given]
    return found


def _figures(task: Callable[[], list[float]]) -> list[float]:
    try:
        return task()
    except NumericsError:
        return [math.nan]


class Turns:
    """Assigns pieces of work to processes, identically in all of them."""

    def __init__(self, size: int) -> None:
        """`size` is the number of processes."""
        self._loads = [0.0] * size

    def of(self, count: int, weight: float) -> list[int]:
        """The process for each of `count` pieces of this weight. No process gets a second piece before all have one,
        because the next pieces may have to wait for all of these. The process with the least work so far comes
        first."""
        found: list[int] = []
        for _ in range(count):
            rank = min(range(len(self._loads)), key=lambda one: (found.count(one), self._loads[one]))
            self._loads[rank] += weight
            found.append(rank)
        return found
