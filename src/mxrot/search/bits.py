"""The cost of a mixture: mean bits of a weight, and of an element of the inputs.

Bits of a weight are those of `mxrot plan`: codes and their scales, over all linears of the decoder blocks, including
unquantized ones, without transforms. Inputs count once for all linears of a site, because these read the same inputs:
the mean is over the inputs of one token at all sites, scales included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from mxrot.models import Family
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme, SiteScheme
from mxrot.search.choices import Choice, everywhere


class Cell(NamedTuple):
    """The sites of one kind in one decoder block. They are raised together."""

    kind: str
    block: int


Mixture = Mapping[Cell, Choice]
"""The raised cells and their choices. All other cells are as in the recipe."""


def spelled(mixture: Mixture) -> str:
    """One line, equal for equal mixtures."""
    return " ".join(f"{cell.kind}.{cell.block}={choice.spelled}" for cell, choice in sorted(mixture.items()))


class Bits(NamedTuple):
    """Mean bits, or an increase of them."""

    weights: float
    inputs: float


@dataclass(frozen=True)
class Limits:
    """The upper limits of a mixture. None is no limit."""

    weights: float | None = None
    inputs: float | None = None

    def admit(self, bits: Bits) -> bool:
        """True if the bits are within the limits, up to the rounding error of a sum."""
        return all(most is None or own <= most + 1e-9 for own, most in zip(bits, self.pair, strict=True))

    @property
    def pair(self) -> tuple[float | None, float | None]:
        return self.weights, self.inputs


@dataclass(frozen=True)
class Costs:
    """The bits of every possible raise."""

    base: Bits
    """The bits with nothing raised."""
    added: Mapping[Cell, Mapping[Choice, Bits]]
    """By cell, the increase of both means by each choice. No choice takes fewer bits than the recipe, and each takes
    more bits in at least one mean."""

    @staticmethod
    def of(
        recipe: Recipe, choices: Sequence[Choice], family: Family, model: PreTrainedModel, stored: torch.dtype
    ) -> Costs:
        """The costs for a skeleton. Unquantized weights count in the type `stored`."""
        base = Scheme.of(recipe, family, model)
        raised = {choice: Scheme.of(everywhere(recipe, choice), family, model) for choice in choices}
        shapes = _shapes(family, model)
        weights = sum(rows * width for rows, width in shapes.values())
        left = sum(shapes[name][0] * shapes[name][1] for name in base.left)
        cells = _cells(base, family, model)
        inputs = sum(shapes[names[0]][1] for names in cells.values())

        def total(scheme: Scheme, cell: Cell) -> Bits:
            names = cells[cell]
            one, width = scheme.linears[names[0]], shapes[names[0]][1]
            taken = sum(sum(one.weight_bytes(*shapes[name])) for name in names)
            return Bits(8 * taken / weights, _input_bits(one, width, stored) / inputs)

        own = {cell: total(base, cell) for cell in cells}
        of_left = 8 * stored.itemsize * left / weights
        base_bits = Bits(of_left + sum(x.weights for x in own.values()), sum(x.inputs for x in own.values()))
        added: dict[Cell, dict[Choice, Bits]] = {}
        for cell, before in own.items():
            after = {choice: total(scheme, cell) for choice, scheme in raised.items()}
            more = {one: Bits(x.weights - before.weights, x.inputs - before.inputs) for one, x in after.items()}
            added[cell] = {choice: bits for choice, bits in more.items() if min(bits) >= 0 and max(bits) > 0}
        return Costs(base_bits, added)

    def bits(self, mixture: Mixture) -> Bits:
        """The bits of a mixture."""
        more = [self.added[cell][choice] for cell, choice in mixture.items()]
        return Bits(self.base.weights + sum(x.weights for x in more), self.base.inputs + sum(x.inputs for x in more))

    def all_of(self, choice: Choice, kind: str | None = None, block: int | None = None) -> dict[Cell, Choice]:
        """All cells that this choice raises, of one kind or one block if that is given."""
        return {
            cell: choice
            for cell, choices in self.added.items()
            if choice in choices and kind in (None, cell.kind) and block in (None, cell.block)
        }

    @property
    def choices(self) -> list[Choice]:
        """The choices that raise any cell, cheapest first."""
        whole = {choice: self.bits(self.all_of(choice)) for choice in {x for more in self.added.values() for x in more}}
        return sorted(whole, key=lambda choice: (round(sum(whole[choice]), 6), choice.spelled))

    @property
    def kinds(self) -> list[str]:
        """The kinds, in the order in which a block computes them."""
        return list(dict.fromkeys(cell.kind for cell, choices in self.added.items() if choices))

    @property
    def blocks(self) -> list[int]:
        return sorted({cell.block for cell, choices in self.added.items() if choices})


def _shapes(family: Family, model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Rows and width of each linear of the decoder blocks, by its full name."""
    return {
        f"{family.blocks}.{name}": (module.out_features, module.in_features)
        for name, module in model.get_submodule(family.blocks).named_modules()
        if isinstance(module, nn.Linear)
    }


def _cells(scheme: Scheme, family: Family, model: PreTrainedModel) -> dict[Cell, list[str]]:
    """The full names of the linears of each cell."""
    found = {}
    for index in range(len(list(model.get_submodule(family.blocks).children()))):
        for site in scheme.active_sites(family, index):
            found[Cell(site.group, index)] = [f"{family.block_prefix(index)}.{name}" for name in site.linears]
    return found


def _input_bits(scheme: SiteScheme, width: int, stored: torch.dtype) -> float:
    """The bits of one token's inputs to a site."""
    return 8.0 * stored.itemsize * width if scheme.activations is None else scheme.activations.format.bits_in(width)
