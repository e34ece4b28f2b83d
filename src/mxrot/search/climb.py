"""The search itself: it decides what to measure next, and what to raise. It knows no model, only a ruler that gives the
KL of a mixture.

First each kind of site is raised in all blocks, and each block with all of its sites, because no cheaper score predicts
the gain of a raise (arXiv 2609.01587). The gain of a kind, times the block's share of the gain of all blocks, is the
estimate for a single cell. It only decides the order of measurements. Then, from the best uniform choice within the
limits, cells are raised one after the other. Gains do not add, so each candidate is measured on top of the cells that
are already raised (the lazy greedy algorithm: Minoux 1978), a few candidates a step. The candidate with the largest
gain of KL for its share of the available bits is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mxrot.search.bits import Bits, Cell, Costs, Limits, Mixture
from mxrot.search.choices import Choice

LOOKS = 4
"""The number of candidates that are measured before one of them is raised."""
WITHOUT_GAIN = 12
"""The number of candidates in a row without a gain after which the search stops."""


class Ruler(Protocol):
    """Measures mixtures."""

    def kl(self, mixture: Mixture, stage: str) -> float:
        """KL from the original, in nats per token."""

    def expect(self, mixtures: Sequence[Mixture], stage: str) -> None:
        """Announce the next measurements: the first for certain, the others probably, in their order. A ruler that
        measures several mixtures at once can do so now."""

    def settle(self, mixture: Mixture) -> None:
        """Announce that the next mixtures will differ little from this one."""


Move = tuple[Cell, Choice]


@dataclass(frozen=True)
class Alone:
    """The gains of raising one kind, or one block."""

    base: float
    """KL with nothing raised."""
    uniform: Mapping[Choice, float]
    """KL with all cells raised."""
    kinds: Mapping[tuple[str, Choice], float]
    """KL with one kind raised in all blocks."""
    blocks: Mapping[int, float]
    """KL with one block raised to `blocks_to`."""
    blocks_to: Choice

    @staticmethod
    def measure(costs: Costs, ruler: Ruler) -> Alone:
        """Measure all of it, the blocks with the most expensive choice."""
        choices = costs.choices
        base = ruler.kl({}, "nothing raised")
        ruler.settle({})
        last = choices[-1]
        blocks = {block: costs.all_of(last, block=block) for block in reversed(costs.blocks)}
        kinds = {
            (kind, choice): costs.all_of(choice, kind=kind)
            for choice in choices
            for kind in costs.kinds
            if costs.all_of(choice, kind=kind)
        }
        uniform = {choice: costs.all_of(choice) for choice in choices}
        left = [*blocks.values(), *kinds.values(), *uniform.values()]  # neighbours take about the same time

        def kl(mixture: Mixture, stage: str) -> float:
            ruler.expect(left, stage)
            left.pop(0)
            return ruler.kl(mixture, stage)

        of_blocks = {block: kl(mixture, "a block") for block, mixture in blocks.items()}
        of_kinds = {raised: kl(mixture, "a kind") for raised, mixture in kinds.items()}
        of_all = {choice: kl(mixture, "everything") for choice, mixture in uniform.items()}
        return Alone(base, of_all, of_kinds, dict(sorted(of_blocks.items())), last)

    def believed(self, costs: Costs) -> dict[Move, float]:
        """The estimated gain of each single raise from nothing raised, in nats per token, by the gains of kinds and
        blocks."""
        gains = {block: max(0.0, self.base - kl) for block, kl in self.blocks.items()}
        whole = sum(gains.values())
        count = len(gains)
        return {
            (cell, choice): max(0.0, self.base - self.kinds[cell.kind, choice])
            * (gains[cell.block] / whole if whole else 1 / count)
            for cell, choices in costs.added.items()
            for choice in choices
        }


@dataclass
class Climb:
    """Raises cells until the bits are spent or no raise gains."""

    costs: Costs
    limits: Limits
    ruler: Ruler
    believed: dict[Move, float]
    """The estimated gains over nothing raised."""

    def run(self, start: Mixture) -> dict[Cell, Choice]:
        """The raised cells in the end."""
        chosen = dict(start)
        gains = dict(self.believed)
        for cell, choice in chosen.items():
            for other in self.costs.added[cell]:
                gains[cell, other] -= self.believed[cell, choice]
        now = self.ruler.kl(chosen, "raised")
        self.ruler.settle(chosen)
        while True:
            found = self._best(chosen, now, gains)
            if found is None:
                return chosen
            (cell, choice), gain = found
            for other in self.costs.added[cell]:
                gains[cell, other] -= gain  # only the additional gain of another choice
            chosen[cell] = choice
            now -= gain
            self.ruler.settle(chosen)

    def _best(self, chosen: dict[Cell, Choice], now: float, gains: dict[Move, float]) -> tuple[Move, float] | None:
        """The raise with the largest gain for its bits, among the most promising ones. None if no raise gains."""
        looked: dict[Move, float] = {}
        while True:
            if len(looked) >= WITHOUT_GAIN:
                return None
            open_moves = [move for move, gain in gains.items() if gain > 0 and self._fits(chosen, move)]
            if not open_moves:
                return None
            ordered = sorted(open_moves, key=lambda move: self._rate(chosen, move, gains[move]), reverse=True)
            best = ordered[0]
            if best in looked:
                return best, looked[best]
            others = [move for move in ordered if move not in looked][: WITHOUT_GAIN - len(looked)]
            self.ruler.expect([{**chosen, cell: choice} for cell, choice in others], "candidate")
            gains[best] = looked[best] = now - self.ruler.kl({**chosen, best[0]: best[1]}, "candidate")
            if len(looked) >= LOOKS and max(looked.values()) > 0:
                best = max(looked, key=lambda move: self._rate(chosen, move, looked[move]))
                return best, looked[best]

    def _more(self, chosen: Mixture, move: Move) -> Bits:
        """The bits that a raise adds."""
        cell, choice = move
        before = self.costs.added[cell][chosen[cell]] if cell in chosen else Bits(0.0, 0.0)
        after = self.costs.added[cell][choice]
        return Bits(after.weights - before.weights, after.inputs - before.inputs)

    def _fits(self, chosen: Mixture, move: Move) -> bool:
        more, bits = self._more(chosen, move), self.costs.bits(chosen)
        is_raise = min(more) >= 0 and max(more) > 0
        return is_raise and self.limits.admit(Bits(bits.weights + more.weights, bits.inputs + more.inputs))

    def _rate(self, chosen: Mixture, move: Move, gain: float) -> tuple[float, float]:
        """The gain for the share of the bits that may be spent beyond the recipe's own. A raise that spends none of
        them comes first."""
        pairs = zip(self._more(chosen, move), self.limits.pair, self.costs.base, strict=True)
        spent = sum(more / (most - base) for more, most, base in pairs if most is not None and more > 0)
        return (gain / spent if spent > 0 else math.copysign(math.inf, gain)), gain
