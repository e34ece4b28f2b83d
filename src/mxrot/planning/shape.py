"""The sizes of a model that a plan is made from: counts and shapes, without a weight."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from mxrot.layers import ModelSize
from mxrot.models import Family, Site, score_heads, value_heads
from mxrot.recipe import TRANSFORM_BLOCK, Recipe


@dataclass(frozen=True)
class SiteShape:
    """A site of one decoder block."""

    site: Site
    rows: tuple[int, ...]
    """out_features of each linear."""
    inputs: int
    """Channels that its linears read, K."""

    @property
    def outputs(self) -> int:
        """Rows of all its linears together, N."""
        return sum(self.rows)

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs

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
            tuple(_site_shape(block, site) for site in family.active_sites(index, ignore))
            for index, block in enumerate(modules)
        )
        own = sum(parameter.numel() for parameter in modules[0].parameters())
        inside = sum(parameter.numel() for block in modules for parameter in block.parameters())
        whole = sum(parameter.numel() for parameter in model.parameters())
        linears = [module for module in modules[0].modules() if isinstance(module, nn.Linear)]
        width = value_heads(config)[1]
        return ModelShape(
            family=family.name,
            blocks=blocks,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            block_parameters=own,
            parameters=whole,
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
    def quantized_weights(self) -> int:
        return sum(site.weights for sites in self.blocks for site in sites)

    def size_after(self, recipe: Recipe, stored: torch.dtype) -> ModelSize:
        """What a checkpoint by `recipe` takes, whose other tensors are in the type `stored`."""
        weights = recipe.weights.quantizer()
        count = self.quantized_weights
        transforms = 0
        if recipe.has_transform:
            matrices = (
                1 if recipe.sharing == "site" else site.inputs // TRANSFORM_BLOCK
                for sites in self.blocks
                for site in sites
            )
            transforms = sum(matrices) * TRANSFORM_BLOCK**2 * torch.bfloat16.itemsize
        scale_bits = weights.rule.stored_type(weights.format.scale).bits
        return ModelSize(
            quantized_weights=count,
            code_bytes=count * weights.format.element.bits // 8,
            scale_bytes=count // weights.format.block * scale_bits // 8,
            transform_bytes=transforms,
            other_bytes=(self.parameters - count) * stored.itemsize,
        )

    def site_counts(self) -> list[tuple[SiteShape, int]]:
        """Each different site, and in how many blocks it is."""
        return list(Counter(site for sites in self.blocks for site in sites).items())


def _site_shape(block: nn.Module, site: Site) -> SiteShape:
    linears = [block.get_submodule(name) for name in site.linears]
    assert all(isinstance(linear, nn.Linear) for linear in linears)
    rows = tuple(int(linear.out_features) for linear in linears)  # type: ignore[arg-type]
    return SiteShape(site, rows, int(linears[0].in_features))  # type: ignore[arg-type]
