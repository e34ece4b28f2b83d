"""What is installed in each linear of a model. A scheme is made from a recipe here, and installed in modules here.

config.json of a checkpoint lists it (`checkpoint.config`), and alone decides what runs. recipe.toml records how the
checkpoint was made. All code that builds a quantized model calls `install`: to quantize, load or time it, in
transformers or vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from mxrot.formats import AttentionOperands, QTensor, TensorQuantizer
from mxrot.formats import CacheScheme as CacheScheme
from mxrot.layers import (
    HeadLinear,
    InputTransform,
    QuantLinear,
    prepare_linears,
    prepare_on_gpus,
    quantize_attention,
    quantize_cache,
)
from mxrot.models import Family, Site, value_heads
from mxrot.recipe import Accumulation, Recipe
from mxrot.rules import Rules
from mxrot.surgery import install_empty_site
from mxrot.transforms.site_transform import SiteTransform, stored_tensors
from mxrot.transforms.stages import StageSpec

HEAD_TRANSFORM = "head"
"""The name of the transform of a quantized head in a checkpoint."""


@dataclass(frozen=True)
class SiteScheme:
    """What is installed at a site."""

    weights: TensorQuantizer
    activations: TensorQuantizer | None = None
    """None: the inputs are not quantized."""
    stages: tuple[StageSpec, ...] = ()
    """The stages of the input transform, in the order in which they are applied."""
    accumulation: Accumulation = "exact"

    @property
    def input_block(self) -> int:
        """in_features must be a multiple of this number."""
        quantizers = [self.weights] if self.activations is None else [self.weights, self.activations]
        blocks = [quantizer.format.block or 1 for quantizer in quantizers]
        return math.lcm(*blocks, *(stage.multiple for stage in self.stages))

    @property
    def spelled(self) -> str:
        """In words: "weights mxfp4 even, inputs mxfp4 even, block-diagonal"."""
        inputs = "in 16 bit" if self.activations is None else self.activations.spelled
        stages = ", ".join(stage.kind for stage in self.stages) or "no transform"
        return f"weights {self.weights.spelled}, inputs {inputs}, {stages}"

    def weight_bytes(self, rows: int, width: int) -> tuple[int, int]:
        """The bytes of the codes of a weight [rows, width], and of its scales."""
        return self.weights.stored_bytes(rows, width)

    def transform_bytes(self, width: int) -> int:
        """The bytes of the transform of `width` channels."""
        parts = stored_tensors(self.stages, width).values()
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


@dataclass(frozen=True)
class Scheme:
    """What is installed in a model."""

    linears: Mapping[str, SiteScheme]
    """Schemes by the full names of quantized linears. All linears of a site have the same scheme."""
    left: tuple[str, ...] = ()
    """The sorted full names of the linears of decoder blocks that are not quantized."""
    cache: CacheScheme | None = None
    """None: keys and values are not quantized."""
    attention: AttentionOperands | None = None
    """The quantizers of the operands of attention products. None: attention is computed as in transformers."""
    head: SiteScheme | None = None
    """None: the head is not quantized."""

    @staticmethod
    def of(recipe: Recipe, family: Family, model: PreTrainedModel) -> Scheme:
        """What `recipe` installs, or has installed, in a model. Only names and widths are read."""
        blocks = list(model.get_submodule(family.blocks).children())
        rules = Rules(recipe, family, len(blocks))
        found: dict[str, SiteScheme] = {}
        left: list[str] = []
        for index, block in enumerate(blocks):
            prefix = family.block_prefix(index)
            for site in rules.active_sites(index):
                width = block.get_submodule(site.linears[0]).in_features
                assert isinstance(width, int)
                own = site_scheme(rules.of(index, site.name), width, rules.smooths(site))
                found |= {f"{prefix}.{name}": own for name in site.linears}
            names = (f"{prefix}.{name}" for name, module in block.named_modules() if isinstance(module, nn.Linear))
            left += [name for name in names if name not in found]
        attention = None if recipe.attention is None else recipe.attention.operands()
        cache = None if recipe.cache is None else recipe.cache.scheme()
        return Scheme(found, tuple(sorted(left)), cache, attention, head_scheme(recipe))

    @property
    def distinct(self) -> tuple[SiteScheme, ...]:
        """The distinct schemes, in the order in which they first occur at sites of decoder blocks."""
        return tuple(dict.fromkeys(self.linears.values()))

    @property
    def has_transform(self) -> bool:
        """True if a transform is applied to the inputs of any site."""
        return any(one.stages for one in self.distinct)

    def input_block(self, linear: str) -> int:
        """in_features of a linear, given by its full name, must be a multiple of this number."""
        one = self.linears.get(linear)
        return 1 if one is None else one.input_block

    def active_sites(self, family: Family, index: int) -> tuple[Site, ...]:
        """The sites of block `index`, without linears that are not quantized. Empty sites are left out."""
        prefix = family.block_prefix(index)
        found = []
        for site in family.sites_of(index):
            linears = tuple(name for name in site.linears if f"{prefix}.{name}" in self.linears)
            if linears:
                found.append(replace(site, linears=linears))
        return tuple(found)


def site_scheme(recipe: Recipe, width: int, is_smoothed: bool) -> SiteScheme:
    """What `recipe` itself, without overrides, installs at a site with inputs of `width` channels."""
    stages = recipe.transform.specs(width, recipe.sharing, is_smoothed)
    activations = None if recipe.activations is None else recipe.activations.for_inputs()
    return SiteScheme(recipe.weights.quantizer(), activations, stages, recipe.accumulation)


def head_scheme(recipe: Recipe) -> SiteScheme | None:
    """What `recipe` installs at the head. None if the head is not quantized."""
    head = recipe.head
    if head is None:
        return None
    return SiteScheme(head.weights(), head.activations(), head.stages(), recipe.accumulation)


@dataclass(frozen=True)
class Share:
    """The linears of a model that have one scheme."""

    scheme: SiteScheme
    linears: tuple[str, ...]
    """Full names of the linears."""
    weights: int
    bits_per_weight: float
    """Bits of the codes and of the parts stored with them."""


def shares_of(scheme: Scheme, shapes: Mapping[str, tuple[int, int]]) -> list[Share]:
    """The distinct schemes and the linears that have each. `shapes` are the shapes of all linears, by full name."""
    names: dict[SiteScheme, list[str]] = {}
    for name, one in scheme.linears.items():
        names.setdefault(one, []).append(name)
    found = []
    for one, linears in names.items():
        weights = sum(math.prod(shapes[name]) for name in linears)
        taken = sum(sum(one.weight_bytes(*shapes[name])) for name in linears)
        found.append(Share(one, tuple(linears), weights, 8 * taken / weights))
    return found


def scheme_name(block_index: int, site: Site) -> str:
    """The name of a site's transform in a checkpoint, in characters [a-z0-9_] only."""
    return f"layer{block_index}_{site.name}"


def transform_name(family: Family, index: int, site: Site) -> str:
    """The full name of the module that holds the transform of a site."""
    return f"{family.block_prefix(index)}.{site.linears[0]}.{scheme_name(index, site)}_input"


def install_site(
    block: nn.Module, index: int, site: Site, scheme: SiteScheme, device: torch.device | str | None = None
) -> None:
    """Replace the linears of a site of block `index` by quantized ones, with all codes and scales zero.

    The first linear owns the transform, which is empty. It is on the device of that linear unless another is given.
    """
    first = block.get_submodule(site.linears[0])
    assert isinstance(first, nn.Linear)
    transform = None
    if scheme.stages:
        transform = InputTransform.empty(scheme.stages, first.in_features, device or first.weight.device)
    install_empty_site(block, scheme_name(index, site), site, transform, scheme.weights, scheme.activations)


def fill_site(block: nn.Module, site: Site, weights: Mapping[str, QTensor], transform: SiteTransform | None) -> None:
    """Give an installed site its codes and scales, by the names of its linears, and its transform."""
    for name in site.linears:
        linear = block.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        linear.set_weight(weights[name])
    if transform is not None:
        owner = block.get_submodule(site.linears[0])
        assert isinstance(owner, QuantLinear) and owner.transform is not None
        owner.transform.fill(transform)


def install(model: PreTrainedModel, scheme: Scheme, family: Family) -> None:
    """Install a scheme, without values, in a model whose linears are those of its family."""
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        prefix = family.block_prefix(index)
        for site in scheme.active_sites(family, index):
            install_site(block, index, site, scheme.linears[f"{prefix}.{site.linears[0]}"])
    install_attention(model, scheme, family)
    install_head(model, scheme, family)


def install_head(model: PreTrainedModel, scheme: Scheme, family: Family) -> None:
    """Replace the head by a quantized one without values, if the scheme has one. The head must not be tied to the
    embedding."""
    own = scheme.head
    if own is None:
        return
    old = model.get_submodule(family.head)
    assert isinstance(old, nn.Linear)
    device = old.weight.device
    new = HeadLinear(old.in_features, old.out_features, own.weights, own.activations, old.bias, device)
    if own.stages:
        new.own_transform(HEAD_TRANSFORM, InputTransform.empty(own.stages, old.in_features, device))
    model.set_submodule(family.head, new)


def install_attention(model: PreTrainedModel, scheme: Scheme, family: Family) -> None:
    """Make the attention of all decoder blocks quantize its operands, or keys and values, as the scheme says.

    The matrices that a quantized cache stores have no values yet.
    """
    heads, width = value_heads(model.config.get_text_config())
    for attention in family.attentions(model):
        if scheme.attention is not None:
            quantize_attention(attention, scheme.attention)
        if scheme.cache is not None:
            quantize_cache(attention, scheme.cache, width, heads)


def prepare(model: nn.Module, scheme: Scheme, keeps_fp8: bool = False, only_on_gpus: bool = False) -> None:
    """Prepare the linears of a filled model for faster kernels, and set how each one sums, as its scheme says."""
    for name, linear in model.named_modules():
        if isinstance(linear, QuantLinear) and name in scheme.linears:
            linear.fast = scheme.linears[name].accumulation == "fast"
        elif isinstance(linear, HeadLinear) and scheme.head is not None:
            linear.fast = scheme.head.accumulation == "fast"
    (prepare_on_gpus if only_on_gpus else prepare_linears)(model, keeps_fp8)
