"""The result of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mxrot.recipe import Recipe
from mxrot.search.bits import Bits, Cell, Limits
from mxrot.search.choices import Choice
from mxrot.search.climb import Alone
from mxrot.search.written import Raised
from mxrot.text import Windows

BASE = "nothing raised"
SEARCHED = "mixture, as searched"
QUANTIZED = "mixture, as quantized"
"""The labels of rows."""


@dataclass(frozen=True)
class Kl:
    """KL(original || quantized), in nats per token."""

    windows: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.windows) / len(self.windows)

    @property
    def error(self) -> float:
        """The standard error of the mean over windows. NaN for one window."""
        count = len(self.windows)
        if count < 2:
            return math.nan
        return math.sqrt(sum((one - self.mean) ** 2 for one in self.windows) / (count - 1) / count)

    def as_table(self) -> dict[str, Any]:
        error = None if math.isnan(self.error) else self.error
        return {"kl": self.mean, "kl_error": error, "by_window": list(self.windows)}


@dataclass(frozen=True)
class Row:
    """One model."""

    label: str
    bits: Bits
    seen: Kl
    """KL on the windows of the search."""
    unseen: Kl | None
    """KL on as many other windows. None if the text has none."""

    @property
    def judged(self) -> Kl:
        """KL on windows that the search has not seen, if there are any."""
        return self.seen if self.unseen is None else self.unseen


@dataclass(frozen=True)
class Measured:
    """One measurement of the search."""

    mixture: Mapping[Cell, Choice]
    stage: str
    bits: Bits
    kl: Kl

    def as_table(self) -> dict[str, Any]:
        raised = [f"{cell.kind}.{cell.block}={choice.spelled}" for cell, choice in sorted(self.mixture.items())]
        bits = {"bits_per_weight": self.bits.weights, "bits_per_input": self.bits.inputs}
        return {"stage": self.stage, "raised": raised, **bits, **self.kl.as_table()}


@dataclass(frozen=True)
class Found:
    """The result."""

    model: str
    recipe: Recipe
    """The recipe with the overrides that make the mixture."""
    limits: Limits
    base: Choice
    raised: Sequence[Raised]
    rows: Sequence[Row]
    """The recipe with nothing raised, the mixture as measured, the mixture from `mxrot quantize`, and each choice
    everywhere."""
    alone: Alone
    kind_bits: Mapping[tuple[str, Choice], Bits]
    """The bits of the measurements of `alone`."""
    measured: Sequence[Measured]
    texts: Sequence[Windows]
    """The first half of the windows was used by the search."""

    @property
    def recipe_text(self) -> str:
        """The recipe file: the recipe, below a comment with its measured figures."""
        base, best = self.rows[0], next((row for row in self.rows if row.label == QUANTIZED), self.rows[0])
        said = (
            f"KL from the original {best.judged.mean:.4g} nats a token, and {base.judged.mean:.4g} with nothing raised"
        )
        return f"# Written by mxrot search: {said}\n{self.recipe.to_toml()}"

    def as_table(self) -> dict[str, Any]:
        """The result for a JSON file."""
        return {
            "model": self.model,
            "base": self.base.spelled,
            "limits": {"bits_per_weight": self.limits.weights, "bits_per_input": self.limits.inputs},
            "raised": [one.as_table() for one in self.raised],
            "rows": [
                {
                    "label": row.label,
                    "bits_per_weight": row.bits.weights,
                    "bits_per_input": row.bits.inputs,
                    "searched": row.seen.as_table(),
                    "unseen": None if row.unseen is None else row.unseen.as_table(),
                }
                for row in self.rows
            ],
            "texts": [one.as_table() for one in self.texts],
            "measurements": [one.as_table() for one in self.measured],
            "recipe_toml": self.recipe.to_toml(),
        }
