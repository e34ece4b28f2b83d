"""Orders of channels that two processes find, against those of one."""

from __future__ import annotations

import math
from itertools import cycle

import pytest
import torch
from tests.unit.calibration.two_processes import of_two_processes
from torch import Tensor

from mxrot.calibration.world import ONE, World
from mxrot.quantizing import permuting
from mxrot.quantizing.permuting import Orders, Pair, Wanted
from mxrot.transforms import ChannelOrder, channel_order

TOGETHER = "found together"
BLOCK, AT_ONCE = 8, 2
"""So many orders of one set are found together in a process."""
ASKED: list[tuple[int | None, tuple[int, ...], int, ChannelOrder]] = [
    *((rank, (32,), 1, "correlated") for rank in (0, 0, 1, 0, 0, 0, 0)),
    *((rank, (48,), 1, "correlated") for rank in (1, 1)),
    *((rank, (48,), 1, "balanced") for rank in (0, 1)),
    *((None, (48,), 1, "balanced") for _ in range(3)),
    *((rank, (32,), 1, "correlated") for rank in (1, 0, 1)),
    *((None, (2, 32), 3, "correlated") for _ in range(3)),
]
"""By which process (None: by the one whose turn it is), of which shape, how many sets of moments, and in which kind."""


def moments(position: int) -> Pair:
    """Of rows that are mixed a little, and of channels of many sizes."""
    _, shape, sets, _ = ASKED[position]
    generator = torch.Generator().manual_seed(position)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    def of_one() -> Tensor:
        mixed = torch.eye(shape[-1], dtype=torch.float64) + 0.3 * random(shape[-1], shape[-1])
        rows = random(*shape[:-1], sets, 100, shape[-1]) @ mixed * (0.5 * random(shape[-1])).exp()
        return rows.mT @ rows / 100

    return of_one(), of_one()


def found_by(world: World, asked: range) -> dict[str, Tensor]:
    """With moments in the process alone that finds the order, where it is known."""
    orders = Orders(world)
    for position in asked:
        rank, shape, sets, kind = ASKED[position]
        wanted = Wanted(str(position), shape, sets, BLOCK, kind)
        if rank is None:
            orders.ask(wanted, moments(position))
        else:
            rank %= world.size
            orders.ask_of(rank, wanted, moments(position) if rank == world.rank else None)
    orders.find()
    orders.find()  # nothing is left
    return orders.found


def work(world: World) -> dict[str, Tensor]:
    permuting.at_once = lambda sets, width: max(1, AT_ONCE // sets)
    calls: list[int] = []
    own = permuting.channel_orders

    def counted(inputs: Tensor, *rest: object) -> Tensor:
        calls.append(len(inputs))
        return own(inputs, *rest)  # type: ignore[arg-type]

    permuting.channel_orders = counted
    found = found_by(world, range(len(ASKED)))
    return found | {TOGETHER: torch.tensor(calls)}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return of_two_processes(work, tmp_path_factory.mktemp("orders"))


def test_both_have_the_orders_of_one_process(both: list[dict[str, Tensor]]) -> None:
    """Where one finds more of them than the other, or none, and where widths, kinds and sets change in between."""
    expected = found_by(ONE, range(len(ASKED)))
    assert list(expected) == [str(position) for position in range(len(ASKED))]
    assert len({tuple(order.flatten().tolist()) for order in expected.values()}) == len(ASKED)
    for found in both:
        assert found.keys() == expected.keys() | {TOGETHER}
        assert [name for name, order in expected.items() if not torch.equal(found[name], order)] == []
        assert found[TOGETHER].max() == AT_ONCE, "as many as there is memory for, however they are shared out"


def test_each_finds_its_own_and_by_turns_those_of_nobody(both: list[dict[str, Tensor]]) -> None:
    turns = cycle((0, 1))
    counts = [0, 0]
    for rank, shape, _, _ in ASKED:
        counts[next(turns) if rank is None else rank] += math.prod(shape[:-1])
    assert [int(found[TOGETHER].sum()) for found in both] == counts


def test_each_is_that_of_its_own_moments(both: list[dict[str, Tensor]]) -> None:
    for position, (_, shape, sets, kind) in enumerate(ASKED):
        pairs = zip(*(one.view(-1, sets, *one.shape[-2:]) for one in moments(position)), strict=True)
        order = torch.stack([channel_order(x, w, BLOCK, kind) for x, w in pairs]).view(shape)
        assert torch.equal(both[1][str(position)], order) and both[1][str(position)].dtype == torch.int64
