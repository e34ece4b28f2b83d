"""Test the claims of a record on a small model in float64, with the same functions that will rely on them.

If the logits of a model with random weights stay the same under a random change of a kind, that change preserves the
model's function. It then holds for other weights, too, except with probability zero. `TOLERANCE` allows for rounding in
float64; a change that does not fold away moves the logits by about their own size. Each change is tried with two sizes
of weights, because a bound (such as a clip of values) shows only if values reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.deriving.float64 import InFloat64
from mxrot.errors import ConfigError
from mxrot.models import Family, Site, Source, value_heads
from mxrot.surgery import PermutedFfn, PermutedHeads, RotatedHeads, fold_into_producer, shareable_scales
from mxrot.transforms.base import random_orthogonal

TOLERANCE = 1e-9
"""The largest change of logits relative to their norm: what 2^-52 becomes after some thousands of sums that cancel."""

MAGNITUDES = (1.0, 1e4)
"""Factors of linears' weights, relative to those with which a linear keeps the size of its input."""


class Trial:
    """A small model in float64, and changes of it that must preserve its logits."""

    def __init__(self, model: PreTrainedModel, family: Family, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.names = [family.block_prefix(index) for index in range(model.config.num_hidden_layers)]
        self._plain = {name: value.clone() for name, value in self._tensors().items()}

    def holds(self, change: Callable[[], None]) -> bool:
        """True if `change` changes the model but not its logits. The model is restored afterwards."""
        try:
            return all(self._holds_at(magnitude, change) for magnitude in MAGNITUDES)
        except (AttributeError, ConfigError, IndexError, KeyError, RuntimeError, ValueError):
            return False  # no such module, or its shape does not fit
        finally:
            self._set(1.0)

    def _holds_at(self, magnitude: float, change: Callable[[], None]) -> bool:
        self._set(magnitude)
        expected, before = self._logits(), {name: value.clone() for name, value in self._tensors().items()}
        change()
        is_changed = any(not torch.equal(value, before[name]) for name, value in self._tensors().items())
        return is_changed and bool((self._logits() - expected).norm() <= TOLERANCE * expected.norm())

    def folds(self, site: Site) -> bool:
        """True if scales can go from the linears of `site` into its norm or its producer, in every block."""
        heads, generator = value_heads(self.model.config), torch.Generator().manual_seed(1)

        def change() -> None:
            for name in self.names:
                block = self.model.get_submodule(name)
                kept = {one for one in (*site.linears, site.producer) if one is not None}
                weights = {one: block.get_submodule(one).get_parameter("weight").data.clone() for one in kept}
                count = weights[site.linears[0]].shape[1]
                drawn = torch.exp2(torch.randn(count, generator=generator, dtype=torch.float64))
                scales = shareable_scales(drawn, site, heads)
                fold_into_producer(block, site, weights, scales, heads, torch.float64)
                for one, weight in weights.items():
                    block.get_submodule(one).get_parameter("weight").data.copy_(weight)

        return self.holds(change)

    def inputs(self, linear: str) -> int:
        """The number of input channels of a linear of a block."""
        return int(self.model.get_submodule(f"{self.names[0]}.{linear}").get_parameter("weight").shape[1])

    def outputs(self, linear: str) -> int:
        """The number of its output channels."""
        return int(self.model.get_submodule(f"{self.names[0]}.{linear}").get_parameter("weight").shape[0])

    def permutes(self, family: Family, number: int) -> bool:
        """True if the input channels of site `number` can be permuted in each block."""
        generator, (linear,) = torch.Generator().manual_seed(2), family.sites[number].linears

        def change() -> None:
            width = self.inputs(linear)
            orders = {f"{name}.{linear}": torch.randperm(width, generator=generator) for name in self.names}
            self._take(PermutedFfn(_Memory(self, family), orders))

        return self.holds(change)

    def turns_heads(self, family: Family) -> bool:
        """True if value heads can be rotated and their channels permuted."""
        generator = torch.Generator().manual_seed(3)
        heads, width = value_heads(self.model.config)

        def rotate() -> None:
            matrices = random_orthogonal(len(self.names), width, generator).double()
            self._take(RotatedHeads(_Memory(self, family), matrices))

        def permute() -> None:
            drawn = [torch.randperm(width, generator=generator) for _ in range(heads * len(self.names))]
            self._take(PermutedHeads(_Memory(self, family), torch.stack(drawn).view(-1, heads, width)))

        return self.holds(rotate) and self.holds(permute)

    def _take(self, source: Source) -> None:
        for index, name in enumerate(self.names):
            self.model.get_submodule(name).load_state_dict(source.block(index))

    def _logits(self) -> Tensor:
        with torch.no_grad(), InFloat64():
            logits: Tensor = self.model(input_ids=self.ids, use_cache=False).logits
        return logits

    def _tensors(self) -> dict[str, Tensor]:
        return {
            key: value
            for name in self.names
            for key, value in self.model.get_submodule(name).state_dict(prefix=f"{name}.").items()
        }

    def _set(self, magnitude: float) -> None:
        """Restore the blocks, with the weights of their linears times `magnitude`."""
        for name, value in self._tensors().items():
            plain = self._plain[name]
            value.copy_(plain * magnitude if plain.dim() > 1 else plain)


class _Memory(Source):
    """The small model as a source, for decorators of sources."""

    def __init__(self, trial: Trial, family: Family) -> None:
        self._trial = trial
        self.name, self.folder = "a small model", Path()
        self.config, self.family = trial.model.config, replace(family)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def types(self) -> Mapping[str, torch.dtype]:
        return {}

    def outer(self) -> dict[str, Tensor]:
        return {}

    def block(self, index: int, device: Any = "cpu", names: Any = None) -> dict[str, Tensor]:
        return dict(self._trial.model.get_submodule(self._trial.names[index]).state_dict())

    def problems(self, model: PreTrainedModel) -> Iterator[Any]:
        return iter(())

    def prefetch(self, index: int) -> None:
        """Nothing: it is in memory."""
