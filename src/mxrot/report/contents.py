"""What a report shows, gathered: no file is read and no model run after this."""

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
    """The worst passage in words."""

    where: str
    """Which part of which text it is."""
    rows: list[tuple[int, str, float, str, str]]
    """Position, token, KL in nats, and the most likely tokens of the original and of the quantized model."""
    context: str
    """The end of the text before it."""
    original: str
    """How the original goes on from there, always with its most likely token."""
    quantized: str

    @property
    def said(self) -> list[str]:
        """Of each token, what a pointer finds."""
        return [
            f"{text!r}: KL {kl:.3f}; the original expected {original!r}, quantized {quantized!r}"
            for _, text, kl, original, quantized in self.rows
        ]


@dataclass(frozen=True)
class Contents:
    """One quantized model."""

    run: dict[str, Any]
    """Its run.json."""
    recipe: Recipe
    family: Family
    metrics: list[Metric]
    measured: str
    """How the metrics came about, in a sentence."""
    before: dict[str, ActivationView]
    """The inputs of each site without the transform, by the full name of its first linear."""
    before_is_original: bool
    """Are these the inputs in the original model?"""
    after: dict[str, ActivationView]
    """As they are rounded."""
    chosen: list[str]
    """The sites with a picture of their own."""
    looked_at: str
    """The text that activations were looked at on."""
    exponents: dict[str, Tensor]
    """Blocks of weights by exponent, [256] a site."""
    cache: CacheSize | None = None
    """Of keys and values."""
    commands: list[tuple[str, str]] = field(default_factory=list)
    """What a command does, and the command."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of what made the report."""
    made: str = ""
    """When, in UTC."""
    links: list[tuple[str, str]] = field(default_factory=list)
    """Words and addresses."""
    tokens: list[str] = field(default_factory=list)
    """The text that activations were looked at on, token by token."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Counts of `evaluation.weight_values`."""
    original_weights: dict[str, Tensor] = field(default_factory=dict)
    passage: ShownPassage | None = None
    """None without the original."""
    has_surfaces: bool = False
    """Is |x| also to be drawn as surfaces?"""

    @property
    def name(self) -> str:
        """Of the model that was quantized."""
        return str(self.run["model"])

    @property
    def linears(self) -> list[dict[str, Any]]:
        """As run.json has them."""
        return [linear for block in self.run["blocks"] for linear in block["linears"]]

    def place_of(self, linear: str) -> tuple[int, str]:
        """Block and name within the block of the full name of a linear."""
        block = self.family.group_of(linear)[0]
        return block, linear.removeprefix(f"{self.family.block_prefix(block)}.")

    def site_of(self, linear: str) -> tuple[int, str]:
        """Block and site of the full name of a linear; the site without the number of an expert."""
        return self.family.group_of(linear)
