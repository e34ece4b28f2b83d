"""The arguments of the steps of quantizing: the whole run, and the current part of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.calibration import ONE, Executor, World
from mxrot.cuda_graphs import Replays
from mxrot.models import Family, Site, Source
from mxrot.recipe import Recipe
from mxrot.rules import Rules
from mxrot.scheme import Scheme, SiteScheme
from mxrot.surgery import Weights
from mxrot.watching import Watch


@dataclass(frozen=True)
class BlockRun:
    """The settings that stay the same from block to block."""

    recipe: Recipe
    source: Source
    device: torch.device
    dtype: torch.dtype
    """The type of the computation."""
    seed: int
    scheme: Scheme
    replay: Replays = field(default_factory=Replays)
    world: World = ONE
    """The processes that share the calibration windows."""
    beside: Beside | None = None
    """A callback that sees each site."""
    watch: Watch = field(default_factory=Watch)
    """A callback for blocks and checks of tuning. It can end the run in time."""

    @property
    def family(self) -> Family:
        return self.source.family

    @property
    def config(self) -> Any:
        """The config of the text model."""
        return self.source.config.get_text_config()

    @property
    def stored_dtype(self) -> torch.dtype:
        """The stored type of most weights."""
        return self.source.dtype

    def is_last(self, index: int) -> bool:
        """True if block `index` is the last decoder block."""
        return bool(index + 1 == self.config.num_hidden_layers)

    def rounding_type(self, name: str) -> torch.dtype:
        """The type that a changed tensor is rounded to: its stored type, unless the compute type holds less."""
        own = self.source.types.get(name, self.stored_dtype)
        return own if own == self.stored_dtype or self.dtype.itemsize >= 4 else self.dtype

    def other_types_under(self, prefix: str) -> dict[str, torch.dtype]:
        """The types of tensors whose names start with `prefix` and a dot and whose stored type is not the usual one, by
        the rest of their names."""
        dotted = prefix + "."
        return {name[len(dotted) :]: own for name, own in self.source.types.items() if name.startswith(dotted)}

    @cached_property
    def rules(self) -> Rules:
        """The recipe's rules for the sites of this model."""
        return Rules(self.recipe, self.family, self.config.num_hidden_layers)

    def active_sites(self, index: int) -> tuple[Site, ...]:
        """The sites of block `index` that are quantized."""
        return self.rules.active_sites(index)

    def of(self, part: Part, site: Site) -> tuple[Recipe, SiteScheme]:
        """The rules by which a site is quantized, and the scheme to be installed there."""
        return self.rules.of(part.index, site.name), self.scheme.linears[f"{part.name}.{site.linears[0]}"]


@dataclass(frozen=True)
class Part:
    """A module that contains sites: a decoder block, or one of its experts."""

    name: str
    index: int
    """The index of the decoder block."""
    module: nn.Module
    weights: Weights
    """The weights by their names in the module, as they were read; in float64 if smoothing has changed them."""
    executor: Executor | None
    """Runs the module; None if no data is used."""
    original: Executor | None = None
    """Runs the module of the original model; None if neither rounding nor tuning needs it."""


Beside = Callable[[BlockRun, Part, Site, Tensor | None], None]
"""A callback for a site with rounded weights and not yet replaced linears. It also gets the smoothing scales, if these
are not folded. It can round the same weights for the same inputs in another way."""
