"""A mixture as a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mxrot.overrides import Override
from mxrot.recipe import Recipe
from mxrot.search.bits import Bits, Cell, Mixture
from mxrot.search.choices import Choice, base_choice, with_overrides

SUFFIX = "-mixture"
"""The suffix of the name of a recipe that makes a mixture."""


@dataclass(frozen=True)
class Raised:
    """The sites that one table raises."""

    kinds: tuple[str, ...]
    blocks: tuple[int, int]
    """The first and the last block, both included."""
    choice: Choice

    @property
    def blocks_in_words(self) -> str:
        """The blocks in words: "3", or "3 to 5"."""
        first, last = self.blocks
        return str(first) if first == last else f"{first} to {last}"

    def as_table(self) -> dict[str, Any]:
        return {
            "sites": list(self.kinds),
            "blocks": list(self.blocks),
            "weights": self.choice.weights,
            "inputs": self.choice.inputs,
        }


def raised_runs(mixture: Mixture, kinds: Sequence[str]) -> list[Raised]:
    """The raised sites of a mixture, with neighbouring blocks joined, and kinds that are raised in the same blocks."""
    together: dict[tuple[tuple[int, int], Choice], list[str]] = {}
    for kind in kinds:
        own = {cell.block: choice for cell, choice in mixture.items() if cell.kind == kind}
        for choice in dict.fromkeys(own[block] for block in sorted(own)):
            for run in _runs(sorted(block for block, one in own.items() if one == choice)):
                together.setdefault((run, choice), []).append(kind)
    ordered = sorted(together.items(), key=lambda item: (item[0][0], item[0][1].spelled))
    return [Raised(tuple(names), run, choice) for (run, choice), names in ordered]


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first and last block of each run of consecutive blocks."""
    first = last = None
    for block in blocks:
        if first is None or last is None:
            first = last = block
        elif block == last + 1:
            last = block
        else:
            yield first, last
            first = last = block
    if first is not None and last is not None:
        yield first, last


def mixture_recipe(
    recipe: Recipe, mixture: Mapping[Cell, Choice], kinds: Sequence[str], bits: Bits, model: str
) -> Recipe:
    """The recipe that makes a mixture. Its name gives the cost: mxrot-mixture-4.49-8.25 has 4.49 bits per weight and
    8.25 per input."""
    base = base_choice(recipe)
    tables = [
        Override(tuple(sorted(one.choice.changes(base))), one.kinds, one.blocks) for one in raised_runs(mixture, kinds)
    ]
    formats = ", ".join(dict.fromkeys([base.spelled, *sorted(choice.spelled for choice in mixture.values())]))
    taken = f"{bits.weights:.3f} bits a weight, {bits.inputs:.3f} an input"
    summary = f"A mixture of {formats}: {taken}; found by mxrot search on {model}"
    name = f"{recipe.name.partition(SUFFIX)[0]}{SUFFIX}-{bits.weights:.2f}-{bits.inputs:.2f}"
    found = replace(recipe, name=name, summary=" ".join(summary.split()))
    return with_overrides(found, tables)
