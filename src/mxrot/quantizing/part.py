"""What the steps of quantizing are given: the run as a whole, and the part of the model that is at hand."""

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
    """What stays the same from block to block."""

    recipe: Recipe
    source: Source
    device: torch.device
    dtype: torch.dtype
    """In which is computed."""
    seed: int
    scheme: Scheme
    replay: Replays = field(default_factory=Replays)
    world: World = ONE
    """The processes that the calibration windows are spread over."""
    beside: Beside | None = None
    """Sees each site."""
    watch: Watch = field(default_factory=Watch)
    """Hears of blocks and looks of tuning, and ends the run in time."""

    @property
    def family(self) -> Family:
        return self.source.family

    @property
    def config(self) -> Any:
        """Of the text model."""
        return self.source.config.get_text_config()

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of most weights."""
        return self.source.dtype

    def is_last(self, index: int) -> bool:
        """Does no decoder block follow block `index`?"""
        return bool(index + 1 == self.config.num_hidden_layers)

    def rounding_type(self, name: str) -> torch.dtype:
        """What a tensor that is changed here is rounded to: the type that it will be stored in, unless computing holds
        less."""
        own = self.source.types.get(name, self.stored_dtype)
        return own if own == self.stored_dtype or self.dtype.itemsize >= 4 else self.dtype

    def other_types_under(self, prefix: str) -> dict[str, torch.dtype]:
        """The types of tensors that are stored in another one and whose names start with `prefix` and a dot, by the
        rest of their names."""
        dotted = prefix + "."
        return {name[len(dotted) :]: own for name, own in self.source.types.items() if name.startswith(dotted)}

    @cached_property
    def rules(self) -> Rules:
        """The recipe for the sites of this model."""
        return Rules(self.recipe, self.family, self.config.num_hidden_layers)

    def active_sites(self, index: int) -> tuple[Site, ...]:
        """The sites of block `index` that are quantized."""
        return self.rules.active_sites(index)

    def of(self, part: Part, site: Site) -> tuple[Recipe, SiteScheme]:
        """By which rules a site is quantized, and what will be installed there."""
        return self.rules.of(part.index, site.name), self.scheme.linears[f"{part.name}.{site.linears[0]}"]


@dataclass(frozen=True)
class Part:
    """What holds sites: a decoder block, or one of its experts."""

    name: str
    index: int
    """Of the decoder block."""
    module: nn.Module
    weights: Weights
    """By their names in the module, as they were read; in float64 where smoothing has changed them."""
    executor: Executor | None
    """Runs the module; None where no data is looked at."""
    original: Executor | None = None
    """Runs that of the original model; None where neither rounding nor tuning asks for it."""


Beside = Callable[[BlockRun, Part, Site, Tensor | None], None]
"""Is shown a site whose weights are rounded and whose linears are not replaced yet, with its smoothing scales where
these are not folded: it can round the same weights for the same inputs in another way."""
