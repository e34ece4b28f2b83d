"""The quantized model in memory. Its sites can be raised and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from mxrot.checkpoint.partial import PartialCheckpoint
from mxrot.layers import QuantLinear, build_apart
from mxrot.layers.prepare import prepare_site
from mxrot.models import Family, Site, Source, build_skeleton, fill
from mxrot.quantizing.loading import compute_dtype, load_finished_block, load_outer
from mxrot.quantizing.rotating import config_after
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme, install_attention, install_site, prepare
from mxrot.search.bits import Cell, Mixture
from mxrot.search.choices import Choice
from mxrot.search.kept import KeptSearch


@dataclass
class RaisedModel:
    """A model with some sites as another choice makes them."""

    model: PreTrainedModel
    family: Family
    kept: KeptSearch
    schemes: Mapping[Choice, Scheme]
    """By choice, the scheme that it installs."""
    sites: Mapping[Cell, Sequence[tuple[int, Site]]]
    """By cell, its sites, each with its block."""
    blank: Sequence[nn.Module]
    """The blocks, without weights and with plain linears."""
    blank_config: Any
    """Their config."""

    def __post_init__(self) -> None:
        self.mixture: dict[Cell, Choice] = {}
        self._own: dict[Cell, dict[str, nn.Module]] = {}
        self._shared = {id(self.blank_config): self.blank_config}  # a copy of a block needs no copy of its config

    @staticmethod
    def load(
        source: Source,
        recipe: Recipe,
        schemes: Mapping[Choice, Scheme],
        scheme: Scheme,
        kept: KeptSearch,
        device: torch.device,
    ) -> RaisedModel:
        """The model of a finished pass with nothing raised. `scheme` is its scheme."""
        config, family = config_after(source.config, recipe), source.family
        dtype = compute_dtype(source.dtype, device)
        model, blank = build_skeleton(config), build_apart(config)
        store = kept.store(family, config.get_text_config().num_hidden_layers)
        load_outer(model, family, load_file(store.folder / store.shard(0)), dtype, device)
        install_attention(model, scheme, family)
        blocks = list(model.get_submodule(family.blocks).children())
        sites: dict[Cell, list[tuple[int, Site]]] = {}
        for index, block in enumerate(blocks):
            found = store.load(index)
            assert found is not None, f"block {index} is not finished"
            load_finished_block(block, index, found[0], scheme, family, dtype, device)
            for site in scheme.active_sites(family, index):
                sites.setdefault(Cell(site.group, index), []).append((index, site))
        if device.type == "cuda":
            prepare(model, scheme)
        blanks = list(blank.get_submodule(family.blocks).children())
        return RaisedModel(model, family, kept, schemes, sites, blanks, blank.config)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.family.blocks).children())

    def become(self, mixture: Mixture) -> None:
        """Raise the cells of `mixture`, and put all others back."""
        for cell in [*self.mixture]:
            if self.mixture[cell] != mixture.get(cell):
                self._put(cell, self._own.pop(cell))
                del self.mixture[cell]
        for cell, choice in mixture.items():
            if cell not in self.mixture:
                self._own[cell] = {
                    linear: self.blocks[index].get_submodule(linear)
                    for index, site in self.sites[cell]
                    for linear in site.linears
                }
                self._put(cell, self._made(cell, choice))
                self.mixture[cell] = choice

    def _put(self, cell: Cell, linears: Mapping[str, nn.Module]) -> None:
        for linear, module in linears.items():
            self.blocks[cell.block].set_submodule(linear, module)

    def _made(self, cell: Cell, choice: Choice) -> dict[str, nn.Module]:
        """The linears of a cell as a choice makes them."""
        tensors = self.kept.site(cell, choice)
        found: dict[str, nn.Module] = {}
        for index, site in self.sites[cell]:
            scratch = deepcopy(self.blank[index], self._shared.copy())
            scheme = self.schemes[choice].linears[f"{self.family.block_prefix(index)}.{site.linears[0]}"]
            install_site(scratch, index, site, scheme)
            linears = []
            for name in site.linears:
                linear, own = scratch.get_submodule(name), self._own[cell][name]
                assert isinstance(linear, QuantLinear) and isinstance(own, QuantLinear)
                device = own.weight_packed.device
                dotted = f"{name}."
                stored = {key[len(dotted) :]: x.to(device) for key, x in tensors.items() if key.startswith(dotted)}
                if own.bias is not None:
                    stored["bias"] = own.bias
                fill(linear, stored, f"{self.family.block_prefix(index)}.{name}")
                linear.fast = scheme.accumulation == "fast"
                linears.append(linear)
                found[name] = linear
            if linears[0].weight_packed.is_cuda:
                prepare_site(linears)
        return found


def is_finished(kept: KeptSearch, family: Family, blocks: int) -> bool:
    """True if an earlier search finished the pass over all blocks."""
    store: PartialCheckpoint = kept.store(family, blocks)
    return (store.folder / store.shard(0)).exists() and all(store.load(index) is not None for index in range(blocks))
