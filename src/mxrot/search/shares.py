"""What the processes of a search share: measurements, and sites rounded in other ways. One process does each of them
whole, so that it has the bits that it has in one process; all know what comes out, and take the same next step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from mxrot.calibration import World
from mxrot.errors import NumericsError


def figures_of(tasks: Sequence[Callable[[], list[float]]], world: World) -> list[list[float]]:
    """What each task gives, in all processes; one process does each, as many at a time as there are processes.

    Where others wait for its figures, a task that raises NumericsError gives [NaN]; in one process it raises.
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
    """Which process does what of work that any of them could do; the same in all."""

    def __init__(self, size: int) -> None:
        """Of so many processes."""
        self._loads = [0.0] * size

    def of(self, count: int, weight: float) -> list[int]:
        """By whom each of `count` pieces of that weight is done, of which nobody gets two before all have one: the next
        ones may have to wait until all of these are done. Who has had least so far comes first."""
        found: list[int] = []
        for _ in range(count):
            rank = min(range(len(self._loads)), key=lambda one: (found.count(one), self._loads[one]))
            self._loads[rank] += weight
            found.append(rank)
        return found
