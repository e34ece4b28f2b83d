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

    @property
    def name(self) -> str:
        """Of the model that was quantized."""
        return str(self.run["model"])

    def site_of(self, linear: str) -> tuple[int, str]:
        """Block and site of the full name of a linear; the site without the number of an expert."""
        return self.family.group_of(linear)
