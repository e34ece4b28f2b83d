"""What the processes of a search share, and that all agree on who does it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mxrot.calibration import ONE
from mxrot.calibration.world import OneProcess
from mxrot.errors import NumericsError
from mxrot.search.shares import Turns, figures_of


class Asked(OneProcess):
    """One of several, of which the others give figures that are known."""

    def __init__(self, rank: int, given: list[list[Tensor]]) -> None:
        self.rank, self.size = rank, len(given[0])  # type: ignore[misc]
        self.given, self.own = iter(given), list[Tensor | None]()

    def gather(self, tensor: Tensor | None) -> list[Tensor]:
        self.own.append(tensor)
        return next(self.given)


def broken() -> list[float]:
    raise NumericsError("NaN")


def test_one_process_does_everything_and_raises() -> None:
    assert figures_of([lambda: [0.1], lambda: [0.2, 0.3]], ONE) == [[0.1], [0.2, 0.3]]
    with pytest.raises(NumericsError):
        figures_of([broken], ONE)


def test_every_process_comes_to_every_exchange() -> None:
    """Also with nothing to give, and where its task fails."""
    tasks = [lambda: [1.0], broken, lambda: [3.0]]
    for rank, wanted in ((0, [[1.0], [3.0]]), (1, [[math.nan], None])):
        world = Asked(rank, [[torch.tensor([1.0]), torch.tensor([math.nan])], [torch.tensor([3.0])]])
        assert repr(figures_of(tasks, world)) == "[[1.0], [nan], [3.0]]"
        assert repr([None if own is None else own.tolist() for own in world.own]) == repr(wanted)
        assert all(own is None or own.dtype == torch.float64 for own in world.own)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_turns_are_fair(size: int) -> None:
    turns, loads = Turns(size), [0.0] * size
    for weight in [3.0, 1.0, 4.0, 2.0] * 6:
        ranks = turns.of(2, weight)
        assert len(set(ranks)) == min(2, size), "one has both while another has none"
        for rank in ranks:
            loads[rank] += weight
    assert sum(loads) == 2 * 60.0 and max(loads) - min(loads) <= 2 * 4.0


def test_who_comes_first_has_had_least() -> None:
    turns = Turns(3)
    assert turns.of(1, 5.0) == [0] and turns.of(2, 1.0) == [1, 2] and turns.of(3, 1.0) == [1, 2, 0]
