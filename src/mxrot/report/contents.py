"""The gathered contents of a report. After this, no file is read and no model is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mxrot.checkpoint.metric import Metric
from mxrot.evaluation import ActivationView
from mxrot.layers.cache_size import CacheSize
from mxrot.models import Family
from mxrot.recipe import Recipe


@dataclass(frozen=True)
class ShownPassage:
    """The worst passage as text."""

    where: str
    """The text it is from, and its position there."""
    rows: list[tuple[int, str, float, str, str]]
    """Position, token, KL in nats, and the most likely tokens of the original and of the quantized model."""
    context: str
    """The end of the text before it."""
    original: str
    """The original's continuation from there, always with its most likely token."""
    quantized: str

    @property
    def said(self) -> list[str]:
        """The words that a pointer shows for each token."""
        return [
            f"{text!r}: KL {kl:.3f}; the original expected {original!r}, quantized {quantized!r}"
            for _, text, kl, original, quantized in self.rows
        ]


@dataclass(frozen=True)
class Contents:
    """The contents of a report of one quantized model."""

    run: dict[str, Any]
    """Its run.json."""
    recipe: Recipe
    family: Family
    metrics: list[Metric]
    measured: str
    """The origin of the metrics, in a sentence."""
    before: dict[str, ActivationView]
    """The inputs of each site without the transform, by the full name of its first linear."""
    before_is_original: bool
    """True if these are the inputs in the original model."""
    after: dict[str, ActivationView]
    """The inputs as they are rounded, after the transform."""
    chosen: list[str]
    """The sites with pictures of their own."""
    looked_at: str
    """The text of the activations."""
    exponents: dict[str, Tensor]
    """The number of weight blocks by exponent, [256] per site."""
    cache: CacheSize | None = None
    """The size of keys and values."""
    commands: list[tuple[str, str]] = field(default_factory=list)
    """The purpose of each command, and the command."""
    versions: dict[str, str] = field(default_factory=dict)
    """The versions of the software that made the report."""
    made: str = ""
    """The time, in UTC."""
    links: list[tuple[str, str]] = field(default_factory=list)
    """Link texts and addresses."""
    tokens: list[str] = field(default_factory=list)
    """The text of the activations, token by token."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The counts of `evaluation.weight_values`."""
    original_weights: dict[str, Tensor] = field(default_factory=dict)
    passage: ShownPassage | None = None
    """The worst passage. None without the original."""
    has_surfaces: bool = False
    """True if |x| is also drawn as surfaces."""

    @property
    def name(self) -> str:
        """The name of the quantized model."""
        return str(self.run["model"])

    @property
    def linears(self) -> list[dict[str, Any]]:
        """The linears, as in run.json."""
        return [linear for block in self.run["blocks"] for linear in block["linears"]]

    def place_of(self, linear: str) -> tuple[int, str]:
        """The block of a linear, and its name in the block, from its full name."""
        block = self.family.group_of(linear)[0]
        return block, linear.removeprefix(f"{self.family.block_prefix(block)}.")

    def site_of(self, linear: str) -> tuple[int, str]:
        """The block and the site of a linear, from its full name. The site has no expert number."""
        return self.family.group_of(linear)
