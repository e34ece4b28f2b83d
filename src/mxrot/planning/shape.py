"""The sizes of a model that a plan is made from: counts and shapes, without a weight."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mxrot.layers import ModelSize, score_heads
from mxrot.models import Family, Site, value_heads
from mxrot.recipe import TRANSFORM_BLOCK, Recipe


@dataclass(frozen=True)
class SiteShape:
    """A site of one decoder block."""

    site: Site
    rows: tuple[int, ...]
    """out_features of each linear."""
    inputs: int
    """Channels that its linears read, K."""
    experts: int = 1
    """Experts that the linears are in, each with as many; they are quantized one after the other."""
    share: float = 1.0
    """Of the tokens, that goes to one of them."""
    transforms: int = 1
    """One for all, or one for each expert."""

    @property
    def outputs(self) -> int:
        """Rows of all its linears together, N."""
        return sum(self.rows)

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs

    @property
    def rounded(self) -> int:
        """Rows that are rounded together: those of one expert."""
        return self.outputs // self.experts

    @property
    def child(self) -> str:
        """The direct submodule of the block that holds it."""
        return self.site.linears[0].split(".")[0]


@dataclass(frozen=True)
class ModelShape:
    """What planning must know of a model."""

    family: str
    blocks: tuple[tuple[SiteShape, ...], ...]
    """Of each decoder block the sites that are quantized."""
    hidden: int
    vocabulary: int
    block_parameters: int
    """Of one decoder block, all of them."""
    parameters: int
    """Of the whole model; a tensor that two places share counts once."""
    linear_weights: int
    """Of the linears of all decoder blocks, those that are left alone too."""
    outer_parameters: int
    """Outside of the decoder blocks."""
    query_width: int
    """Query heads times their width."""
    widest: int
    """The largest in_features or out_features of a linear in a block."""
    score_heads: int
    """Heads that write out a score for each pair of tokens."""
    config: object
    """The transformers config."""

    @staticmethod
    def of(model: PreTrainedModel, family: Family, ignore: tuple[str, ...]) -> ModelShape:
        """The shape of a skeleton whose linears have passed `check_linears`."""
        modules = list(model.get_submodule(family.blocks).children())
        config = model.config.get_text_config()
        blocks = tuple(
            _site_shapes(block, family.active_sites(index, ignore), _share(family, config))
            for index, block in enumerate(modules)
        )
        own = sum(parameter.numel() for parameter in modules[0].parameters())
        inside = sum(parameter.numel() for block in modules for parameter in block.parameters())
        whole = sum(parameter.numel() for parameter in model.parameters())
        linears = [module for module in modules[0].modules() if isinstance(module, nn.Linear)]
        in_linears = [m.weight.numel() for block in modules for m in block.modules() if isinstance(m, nn.Linear)]
        width = value_heads(config)[1]
        return ModelShape(
            family=family.name,
            blocks=blocks,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            block_parameters=own,
            parameters=whole,
            linear_weights=sum(in_linears),
            outer_parameters=whole - inside,
            query_width=config.num_attention_heads * width,
            widest=max(max(linear.in_features, linear.out_features) for linear in linears),
            score_heads=score_heads(model),
            config=config,
        )

    @cached_property
    def fullest(self) -> tuple[SiteShape, ...]:
        """The sites of the block of which most is quantized."""
        return max(self.blocks, key=lambda sites: sum(site.weights for site in sites))

    @property
    def active_parameters(self) -> float:
        """Of the whole model, those that one token meets."""
        return self.parameters - sum(site.weights * (1 - site.share) for sites in self.blocks for site in sites)

    @property
    def quantized_weights(self) -> int:
        return sum(site.weights for sites in self.blocks for site in sites)

    def size_after(self, recipe: Recipe, stored: torch.dtype) -> ModelSize:
        """What a checkpoint by `recipe` takes, whose other tensors are in the type `stored`."""
        weights = recipe.weights.quantizer()
        count = self.quantized_weights
        transforms = 0
        if recipe.has_transform:
            matrices = (
                site.transforms * (1 if recipe.sharing == "site" else site.inputs // TRANSFORM_BLOCK)
                for sites in self.blocks
                for site in sites
            )
            transforms = sum(matrices) * TRANSFORM_BLOCK**2 * torch.bfloat16.itemsize
        stored_weights = [
            weights.stored_bytes(rows, site.inputs) for sites in self.blocks for site in sites for rows in site.rows
        ]
        return ModelSize(
            quantized_weights=count,
            code_bytes=sum(codes for codes, _ in stored_weights),
            scale_bytes=sum(parts for _, parts in stored_weights),
            transform_bytes=transforms,
            other_bytes=(self.parameters - count) * stored.itemsize,
            left_weights=self.linear_weights - count,
            left_bytes=(self.linear_weights - count) * stored.itemsize,
        )

    def site_counts(self) -> list[tuple[SiteShape, int]]:
        """Each different site, and in how many blocks it is."""
        return list(Counter(site for sites in self.blocks for site in sites).items())


def _share(family: Family, config: Any) -> float:
    """Of the tokens, that goes to one expert."""
    if family.experts is None:
        return 1.0
    return float(config.num_experts_per_tok / getattr(config, family.experts.count))


def _site_shapes(block: nn.Module, sites: Sequence[Site], share: float) -> tuple[SiteShape, ...]:
    """One for sites of the same kind in all experts."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        groups[site.group].append(site)
    return tuple(_site_shape(block, name, group, share) for name, group in groups.items())


def _site_shape(block: nn.Module, name: str, group: Sequence[Site], share: float) -> SiteShape:
    site = replace(group[0], name=name, linears=tuple(linear for one in group for linear in one.linears))
    linears = [block.get_submodule(linear) for linear in site.linears]
    assert all(isinstance(linear, nn.Linear) for linear in linears)
    rows = tuple(int(linear.out_features) for linear in linears)  # type: ignore[arg-type]
    inputs = int(linears[0].in_features)  # type: ignore[arg-type]
    if not site.is_of_experts:
        return SiteShape(site, rows, inputs)
    return SiteShape(site, rows, inputs, len({x.rpartition(".")[0] for x in site.linears}), share, len(group))
