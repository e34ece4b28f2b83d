"""The heavy steps of a search: quantizing, and opening models. One model is in memory at a time, beside the original's
head. With several processes, this holds for each process."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxrot import api, quantizing
from mxrot.calibration import SideBySide
from mxrot.errors import NumericsError
from mxrot.evaluation import KeptOriginal
from mxrot.evaluation.perplexity import states_of
from mxrot.layers import build_apart
from mxrot.models import FolderSource
from mxrot.progress import Progress
from mxrot.recipe import Recipe
from mxrot.report.trials import let_go
from mxrot.scheme import Scheme
from mxrot.search.bits import Costs, Limits
from mxrot.search.choices import everywhere
from mxrot.search.found import Kl
from mxrot.search.kept import KeptSearch
from mxrot.search.meter import NOT_FINITE, Original
from mxrot.search.raised import RaisedModel, is_finished
from mxrot.search.roundings import OtherRoundings
from mxrot.search.shares import figures_of
from mxrot.tokenizing import Calibration


@dataclass(frozen=True)
class SearchJob:
    """The model, texts and settings of one search."""

    name: str
    """The name of the model, as given."""
    source: FolderSource
    recipe: Recipe
    costs: Costs
    limits: Limits
    calibration: Calibration
    device: torch.device
    seed: int
    kept: KeptSearch
    progress: Progress

    @property
    def blocks(self) -> int:
        return int(self.source.config.get_text_config().num_hidden_layers)

    def quantize_all_ways(self) -> None:
        """Quantize the model, and round every site in all ways, unless this is already done."""
        raises, world = {cell: list(choices) for cell, choices in self.costs.added.items()}, self.kept.world
        family = self.source.family
        is_done = not world.rank and is_finished(self.kept, family, self.blocks) and self.kept.has_sites(raises)
        if world.hand_out(is_done):
            return
        store = None if world.rank else self.kept.store(family, self.blocks)
        beside = OtherRoundings(raises, build_apart(self.source.config), self.kept)
        self._quantize(self.calibration.recipe, self.calibration.windows, store=store, beside=beside)
        world.count(0)  # the first process has written everything
        let_go()

    def originals(self, parts: Sequence[Tensor]) -> list[Original]:
        """The original's states on each set of windows [W, T]. Only its head stays in memory."""
        self.progress(0, 1, "opening the original model")
        model, _ = api.open_model(self.source.folder, str(self.device))
        at_once = max(1, api.EVALUATION_TOKENS.get(self.device.type, 2048) // parts[0].shape[1])
        batches = [[batch.to(self.device) for batch in ids.split(at_once)] for ids in parts]
        with torch.no_grad():
            states = [[states_of(model, batch) for batch in each] for each in batches]
        del model
        let_go()
        head = KeptOriginal(self.source, self.kept.folder).head(self.device)
        return [Original(head, *both) for both in zip(batches, states, strict=True)]

    def raised_model(self) -> RaisedModel:
        """The quantized model with nothing raised."""
        self.progress(0, 1, "opening the quantized model")
        family, skeleton = self.source.family, build_apart(self.source.config)
        schemes = {one: Scheme.of(everywhere(self.recipe, one), family, skeleton) for one in self.costs.choices}
        own = Scheme.of(self.recipe, family, skeleton)
        return RaisedModel.load(self.source, self.recipe, schemes, own, self.kept, self.device)

    def as_quantized(self, recipe: Recipe, originals: Sequence[Original]) -> list[Kl]:
        """KL on each set of windows after quantizing by a recipe."""
        digest = hashlib.sha256(recipe.to_toml().encode()).hexdigest()
        names = [f"quantized by {digest}: {number}" for number in range(len(originals))]
        if not all(name in self.kept.measured for name in names):
            let_go()
            store, world = self.kept.store(self.source.family, self.blocks), self.kept.world
            windows = world.hand_out(None if world.rank else store.load_windows("calibration"))
            if windows is None:
                windows = self.calibration.windows
            else:  # they include the windows that the original has written
                recipe = replace(recipe, calibration=replace(recipe.calibration, generated=0.0))
            model = self._quantize(recipe, windows).model
            assert model is not None
            tasks = [partial(original.kl, model) for original in originals]
            found = figures_of(tasks, world)
            del model, tasks
            if any(math.isnan(value) for figures in found for value in figures):
                with world.first_goes_ahead():
                    raise NumericsError(NOT_FINITE)
            for name, figures in zip(names, found, strict=True):
                self.kept.note(name, figures)
            let_go()
        return [Kl(tuple(self.kept.measured[name])) for name in names]

    def _quantize(self, recipe: Recipe, windows: Tensor | None, **more: Any) -> quantizing.QuantizedModel:
        world = self.kept.world
        more |= {"progress": self.progress, "world": world if world.size == 1 else SideBySide(world)}
        return quantizing.quantize(self.source, recipe, windows=windows, device=self.device, seed=self.seed, **more)
