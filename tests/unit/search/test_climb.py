"""Which mixtures are measured and raised, with a ruler that needs no model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from mxrot.search.bits import Bits, Cell, Costs, Limits, Mixture, spelled
from mxrot.search.choices import Choice
from mxrot.search.climb import LOOKS, Alone, Climb

SIX, EIGHT, INPUTS = Choice("six", "six"), Choice("eight", "eight"), Choice("four", "eight")
KINDS, BLOCKS = ("qkv", "down"), (0, 1, 2)
CELLS = [Cell(kind, block) for block in BLOCKS for kind in KINDS]


@dataclass
class Made:
    """A ruler that knows the KL of everything."""

    known: Callable[[Mixture], float]
    seen: list[Mixture] = field(default_factory=list)
    settled: list[Mixture] = field(default_factory=list)
    expected: list[list[Mixture]] = field(default_factory=list)

    def kl(self, mixture: Mixture, stage: str) -> float:
        self.seen.append(dict(mixture))
        return self.known(mixture)

    def expect(self, mixtures: Sequence[Mixture], stage: str) -> None:
        self.expected.append([dict(mixture) for mixture in mixtures])

    def settle(self, mixture: Mixture) -> None:
        self.settled.append(dict(mixture))


def costs_of(**choices: Bits) -> Costs:
    named = {"six": SIX, "eight": EIGHT, "inputs": INPUTS}
    return Costs(Bits(4.0, 4.0), {cell: {named[name]: bits for name, bits in choices.items()} for cell in CELLS})


def climbed(costs: Costs, limits: Limits, ruler: Made, start: Mixture | None = None) -> dict[Cell, Choice]:
    return Climb(costs, limits, ruler, Alone.measure(costs, ruler).believed(costs)).run(start or {})


def additive(gains: dict[Cell, float]) -> Callable[[Mixture], float]:
    return lambda mixture: 1.0 - sum(gains[cell] for cell in mixture)


@pytest.mark.parametrize("seed", range(5))
def test_where_gains_add_and_cost_the_same_the_best_set_is_found(seed: int) -> None:
    """Gains of a kind times those of a block, which the belief is exact for."""
    draws = random.Random(seed)
    kinds, blocks = {kind: draws.random() for kind in KINDS}, {block: draws.random() for block in BLOCKS}
    gains = {cell: 0.1 * kinds[cell.kind] * blocks[cell.block] for cell in CELLS}
    ruler = Made(additive(gains))
    found = climbed(costs_of(eight=Bits(1.0, 1.0)), Limits(7.0, None), ruler)
    best = max(itertools.combinations(CELLS, 3), key=lambda some: sum(gains[cell] for cell in some))
    assert set(found) == set(best)
    assert ruler.settled[0] == {} and ruler.settled[-1] == found


def test_a_raise_that_says_the_same_as_another_is_not_paid_for() -> None:
    """down of blocks 0 and 1 gain most alone, and no more together; qkv of block 2 gains less alone."""
    first, second, other = Cell("down", 0), Cell("down", 1), Cell("qkv", 2)

    def known(mixture: Mixture) -> float:
        return 1.0 - 0.4 * bool({first, second} & set(mixture)) - 0.1 * (other in mixture)

    found = climbed(costs_of(eight=Bits(1.0, 1.0)), Limits(6.0, None), Made(known))
    assert other in found and len(found) == 2


def test_what_only_harms_is_not_raised_though_there_is_room() -> None:
    gains = dict.fromkeys(CELLS, -0.01) | {Cell("qkv", 1): 0.2}
    found = climbed(costs_of(eight=Bits(1.0, 1.0)), Limits(100.0, None), Made(additive(gains)))
    assert found == {Cell("qkv", 1): EIGHT}


def test_a_cheaper_raise_goes_on_to_a_dearer_one_while_there_is_room() -> None:
    """Six gives most of what eight gives, for half."""

    def known(mixture: Mixture) -> float:
        return 1.0 - sum(0.10 if choice == EIGHT else 0.08 for choice in mixture.values())

    costs = costs_of(six=Bits(1.0, 1.0), eight=Bits(2.0, 2.0))
    assert climbed(costs, Limits(10.0, None), Made(known)) == dict.fromkeys(CELLS, SIX)
    everything = climbed(costs, Limits(16.0, None), Made(known))
    assert everything == dict.fromkeys(CELLS, EIGHT)


def test_a_climb_goes_on_from_a_uniform_start() -> None:
    def known(mixture: Mixture) -> float:
        return 1.0 - sum(0.10 if choice == EIGHT else 0.08 for choice in mixture.values())

    costs = costs_of(six=Bits(1.0, 1.0), eight=Bits(2.0, 2.0))
    found = climbed(costs, Limits(11.5, None), Made(known), dict.fromkeys(CELLS, SIX))
    assert sorted(choice.weights for choice in found.values()) == ["eight"] + 5 * ["six"]


@pytest.mark.parametrize("seed", range(3))
def test_no_candidate_is_above_a_limit(seed: int) -> None:
    draws = random.Random(seed)
    table: dict[str, float] = {}

    def known(mixture: Mixture) -> float:
        return table.setdefault(spelled(mixture), draws.random())

    costs, limits = costs_of(inputs=Bits(0.0, 1.0), eight=Bits(1.0, 1.0)), Limits(6.0, 7.0)
    ruler = Made(known)
    believed = Alone.measure(costs, ruler).believed(costs)
    ruler.seen.clear()
    found = Climb(costs, limits, ruler, believed).run({})
    assert ruler.seen and all(limits.admit(costs.bits(mixture)) for mixture in ruler.seen)
    assert limits.admit(costs.bits(found))
    assert len(ruler.seen) <= 1 + (1 + len(found)) * 12


def test_what_costs_nothing_of_a_limit_comes_first() -> None:
    costs = costs_of(inputs=Bits(0.0, 4.0), eight=Bits(4.0, 4.0))
    ruler = Made(lambda mixture: 1.0 - sum(0.05 if choice == INPUTS else 0.06 for choice in mixture.values()))
    assert climbed(costs, Limits(4.0, None), ruler) == dict.fromkeys(CELLS, INPUTS)


def test_belief_is_the_share_of_a_block_in_what_a_kind_gains() -> None:
    costs = costs_of(eight=Bits(1.0, 1.0))
    gains = {cell: 0.01 * (1 + cell.block) * (2 if cell.kind == "down" else 1) for cell in CELLS}
    alone = Alone.measure(costs, Made(additive(gains)))
    believed = alone.believed(costs)
    assert {cell: believed[cell, EIGHT] for cell in CELLS} == pytest.approx(gains)
    nothing = Alone.measure(costs, Made(lambda mixture: 1.0)).believed(costs)
    assert set(nothing.values()) == {0.0}


def test_few_candidates_are_measured_for_each_that_is_raised() -> None:
    gains = {cell: 0.01 * (1 + number) for number, cell in enumerate(CELLS)}
    costs, ruler = costs_of(eight=Bits(1.0, 1.0)), Made(additive(gains))
    believed = Alone.measure(costs, ruler).believed(costs)
    ruler.seen.clear()
    found = Climb(costs, Limits(8.0, None), ruler, believed).run({})
    assert len(found) == 4 and len(ruler.seen) <= 1 + LOOKS * len(found)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_expected_first_is_asked_next(seed: int) -> None:
    """Within a step what follows is what was expected behind it, in that order: measuring it early is no loss."""
    draws = random.Random(seed)
    gains, noise = {cell: 0.1 * draws.random() for cell in CELLS}, dict[str, float]()

    def known(mixture: Mixture) -> float:
        gained = sum(gains[cell] * (1.3 if choice == EIGHT else 1.0) for cell, choice in mixture.items())
        return 1.0 - gained + noise.setdefault(spelled(mixture), 0.1 * draws.random())

    costs, ruler = costs_of(six=Bits(1.0, 1.0), eight=Bits(2.0, 2.0)), Told(known)
    believed = Alone.measure(costs, ruler).believed(costs)
    everything = [mixture for mixture in ruler.told if isinstance(mixture, dict)]
    assert ruler.expected[0] == everything[1:], "all that is raised alone is expected at once"
    ruler.told.clear()
    Climb(costs, Limits(9.0, None), ruler, believed).run({})
    steps, longest = ruler.steps(), 0
    assert steps
    for step in steps:
        expected, asked = step[0], step[1::2]
        assert asked == expected[: len(asked)]
        assert step[::2] == [expected[place : place + len(one)] for place, one in enumerate(step[::2])]
        longest = max(longest, len(asked))
    assert longest >= LOOKS


class Told(Made):
    """Everything that it is told, in order: what is asked for, and lists of what is expected; None for a step."""

    def __init__(self, known: Callable[[Mixture], float]) -> None:
        super().__init__(known)
        self.told: list[Any] = []

    def kl(self, mixture: Mixture, stage: str) -> float:
        self.told.append(dict(mixture))
        return super().kl(mixture, stage)

    def expect(self, mixtures: Sequence[Mixture], stage: str) -> None:
        super().expect(mixtures, stage)
        self.told.append([dict(mixture) for mixture in mixtures])

    def settle(self, mixture: Mixture) -> None:
        super().settle(mixture)
        self.told.append(None)

    def steps(self) -> list[list[Any]]:
        """What was told between two raises, of the steps in which something was measured."""
        found: list[list[Any]] = [[]]
        for one in self.told[2:]:  # behind the start and its settling
            if one is None:
                found.append([])
            else:
                found[-1].append(one)
        return [step for step in found if step]
