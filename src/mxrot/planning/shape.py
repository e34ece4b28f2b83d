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
from mxrot.models import Family, Kept, PassedOn, Site, query_width, value_heads
from mxrot.recipe import Recipe
from mxrot.rules import Rules
from mxrot.scheme import SiteScheme, head_scheme, site_scheme
from mxrot.transforms import BlockDiagonalSpec, TransformMethod


@dataclass(frozen=True)
class SiteShape:
    """A site of one decoder block."""

    site: Site
    rows: tuple[int, ...]
    """out_features of each linear."""
    inputs: int
    """Channels that its linears read, K."""
    recipe: Recipe
    """By which it is quantized."""
    scheme: SiteScheme
    """What will be installed there."""
    experts: int = 1
    """Experts that the linears are in, each with as many; they are quantized one after the other."""
    share: float = 1.0
    """Of the tokens, that a row gets in the mean."""
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
    def size(self) -> ModelSize:
        """What it takes in a checkpoint."""
        taken = [self.scheme.weight_bytes(rows, self.inputs) for rows in self.rows]
        transforms = self.transforms * self.scheme.transform_bytes(self.inputs)
        return ModelSize(self.weights, sum(one for one, _ in taken), sum(two for _, two in taken), transforms)

    @property
    def is_fused(self) -> bool:
        """Is its transform one that a kernel applies where it quantizes, or none?"""
        quantizer, stages = self.scheme.activations, self.scheme.stages
        if quantizer is None or not stages:
            return True
        (first, *others) = stages
        return not others and isinstance(first, BlockDiagonalSpec) and first.block == quantizer.format.block

    @property
    def follows_original(self) -> bool:
        """Is it rounded towards what the original model computes?"""
        return self.recipe.rounding.requirements.target != "own"

    @property
    def transform(self) -> TransformMethod:
        """How its transform is fitted, beside its rounding."""
        return self.recipe.transform.beside(self.recipe.rounding.mends_later_columns)

    @property
    def rounded(self) -> int:
        """Rows that are rounded together: those of one expert, the largest."""
        found: Counter[str] = Counter()
        for linear, rows in zip(self.site.linears, self.rows, strict=True):
            found[linear.rpartition(".")[0] if self.experts > 1 else ""] += rows
        return max(found.values())

    @property
    def child(self) -> str:
        """The direct submodule of the block that holds it."""
        return self.site.linears[0].split(".")[0]


@dataclass(frozen=True)
class HeadShape:
    """The head, where it is quantized."""

    rows: int
    inputs: int
    scheme: SiteScheme

    @property
    def weights(self) -> int:
        return self.rows * self.inputs

    @property
    def coded_bytes(self) -> int:
        """Of codes, scales and transform."""
        return sum(self.scheme.weight_bytes(self.rows, self.inputs)) + self.scheme.transform_bytes(self.inputs)


@dataclass(frozen=True)
class ModelShape:
    """What planning must know of a model."""

    family: Family
    blocks: tuple[tuple[SiteShape, ...], ...]
    """Of each decoder block the sites that are quantized."""
    hidden: int
    vocabulary: int
    block_parameters: int
    """Of the largest decoder block, all of them."""
    each_block: tuple[int, ...]
    """The same of each decoder block."""
    parameters: int
    """Of the whole model; a tensor that two places share counts once."""
    constants: int
    """Numbers that files hold beside the parameters."""
    linear_weights: int
    """Of the linears of all decoder blocks, those that are left alone too."""
    kept: tuple[tuple[Kept, int], ...]
    """What no recipe quantizes, and of how many decoder blocks."""
    outer_parameters: int
    """Outside of the decoder blocks."""
    query_width: int
    """Query heads times their width."""
    head_width: int
    widest: int
    """The largest in_features or out_features of a linear in a block."""
    score_heads: int
    """Heads that write out a score for each pair of tokens."""
    config: Any
    """The transformers config."""
    head: HeadShape | None = None
    """None where the head is left as it is."""
    passes_on: PassedOn | None = None
    """As of the family."""

    @staticmethod
    def of(model: PreTrainedModel, family: Family, recipe: Recipe) -> ModelShape:
        """The shape of a skeleton whose linears have passed `check_linears`."""
        modules = list(model.get_submodule(family.blocks).children())
        config = model.config.get_text_config()
        rules = Rules(recipe, family, len(modules))
        blocks = tuple(_site_shapes(block, rules, index, config) for index, block in enumerate(modules))
        each = tuple(sum(parameter.numel() for parameter in block.parameters()) for block in modules)
        whole = sum(parameter.numel() for parameter in model.parameters())
        linears = [linear for index, block in enumerate(modules) for linear in _linears(block, family, index)]
        width = value_heads(config)[1]
        return ModelShape(
            family=family,
            blocks=blocks,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            block_parameters=max(each),
            each_block=each,
            parameters=whole,
            constants=_constants(model),
            linear_weights=sum(linear.weight.numel() for linear in linears),
            kept=family.kept_counts(len(modules)),
            outer_parameters=whole - sum(each),
            query_width=config.num_attention_heads * query_width(config),
            head_width=width,
            widest=max(max(linear.in_features, linear.out_features) for linear in linears),
            score_heads=score_heads(model) if recipe.attention is None else config.num_attention_heads,
            config=model.config,
            head=_head_shape(model, family, recipe),
            passes_on=family.passes_on,
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

    def size_after(self, stored: torch.dtype) -> ModelSize:
        """What a checkpoint takes, whose tensors that are not quantized are in the type `stored`."""
        count = self.quantized_weights
        left = self.linear_weights - count
        size = ModelSize(
            other_bytes=(self.parameters + self.constants - count) * stored.itemsize,
            left_weights=left,
            left_bytes=left * stored.itemsize,
        )
        for site, blocks in self.site_counts():
            size += site.size * blocks
        if self.head is not None:
            taken = self.head.coded_bytes
            size += ModelSize(other_bytes=taken - self.head.weights * stored.itemsize, head_bytes=taken)
        return size

    def site_counts(self) -> list[tuple[SiteShape, int]]:
        """Each different site, and in how many blocks it is."""
        return list(Counter(site for sites in self.blocks for site in sites).items())


def _head_shape(model: PreTrainedModel, family: Family, recipe: Recipe) -> HeadShape | None:
    scheme, head = head_scheme(recipe), model.get_submodule(family.head)
    if scheme is None or not isinstance(head, nn.Linear):
        return None
    return HeadShape(head.out_features, head.in_features, scheme)


def _linears(block: nn.Module, family: Family, index: int) -> list[nn.Linear]:
    """Of a block those that are in sites, and those that are kept."""
    groups = [site.linears for site in family.sites_of(index)] + [kept.linears for kept in family.kept_of(index)]
    found = [block.get_submodule(name) for names in groups for name in names]
    return [linear for linear in found if isinstance(linear, nn.Linear)]


def _constants(model: nn.Module) -> int:
    """Numbers in buffers that are part of the state of a model."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sum(tensor.numel() for name, tensor in model.state_dict().items() if name not in parameters)


def _site_shapes(block: nn.Module, rules: Rules, index: int, config: Any) -> tuple[SiteShape, ...]:
    """One for sites of the same kind in all experts that are quantized alike."""
    groups: dict[tuple[str, Recipe], list[Site]] = defaultdict(list)
    for site in rules.active_sites(index):
        groups[site.group, rules.of(index, site.name)].append(site)
    return tuple(
        _site_shape(block, name, group, rules.family, config, recipe, rules.smooths(group[0]))
        for (name, recipe), group in groups.items()
    )


def _site_shape(
    block: nn.Module,
    name: str,
    group: Sequence[Site],
    family: Family,
    config: Any,
    recipe: Recipe,
    is_smoothed: bool,
) -> SiteShape:
    site = replace(group[0], name=name, linears=tuple(linear for one in group for linear in one.linears))
    linears = [block.get_submodule(linear) for linear in site.linears]
    assert all(isinstance(linear, nn.Linear) for linear in linears)
    rows = tuple(int(linear.out_features) for linear in linears)  # type: ignore[arg-type]
    inputs = int(linears[0].in_features)  # type: ignore[arg-type]
    scheme = site_scheme(recipe, inputs, is_smoothed)
    if not site.is_of_experts:
        return SiteShape(site, rows, inputs, recipe, scheme)
    experts = len({linear.rpartition(".")[0] for linear in site.linears})
    shares = (family.token_share(config, linear) for linear in site.linears)
    share = sum(one * own for one, own in zip(shares, rows, strict=True)) / sum(rows)
    return SiteShape(site, rows, inputs, recipe, scheme, experts, share, len(group))
