"""The contents of a model: channel maxima of its sites, exponents of its weights, and the kernels of its linears."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.calibration import ChannelMaxima, watched_inputs
from mxrot.layers import QuantLinear, cache_scheme_of, operands_of, separate_experts
from mxrot.layers.cache_size import bits_per_element, cache_of
from mxrot.models import Family, value_heads
from mxrot.progress import Progress, silent


@dataclass(frozen=True)
class SiteMaxima:
    """The outlier ratio of the largest channel of a site."""

    site: str
    """The full name of the first linear of the site."""
    channels: int
    largest: float
    """max |x| over tokens and channels."""
    channel: int
    """The channel of the largest value."""
    median: float
    """The median over channels of the channel maxima."""

    @property
    def ratio(self) -> float:
        return self.largest / self.median if self.median > 0 else float("inf")


@torch.no_grad()
def site_maxima(
    model: PreTrainedModel,
    family: Family,
    windows: Tensor,
    batch_windows: int = 1,
    progress: Progress = silent,
) -> list[SiteMaxima]:
    """Channel maxima of every site of every decoder block over token windows [W, T].

    If each expert of a block has its own site, only the one with the largest ratio is returned. Experts of `model` get
    separate linears.
    """
    separate_experts(model)
    device = next(model.parameters()).device
    collectors: dict[tuple[int, str], dict[str, ChannelMaxima]] = defaultdict(dict)
    with ExitStack() as hooks:
        for index, block in enumerate(model.get_submodule(family.blocks).children()):
            for site in family.sites_of(index):
                collector = ChannelMaxima()
                collectors[index, site.group][f"{family.block_prefix(index)}.{site.linears[0]}"] = collector
                hooks.enter_context(watched_inputs(block.get_submodule(site.reader), collector.update))
        for index, batch in enumerate(windows.split(batch_windows)):
            progress(index * batch_windows, len(windows), "windows")
            model.get_submodule(family.body)(input_ids=batch.to(device), use_cache=False)
    found = []
    for group in collectors.values():
        seen = [_describe(name, collector.result()) for name, collector in group.items() if collector.has_seen]
        found.append(max(seen, key=lambda maxima: maxima.ratio))
    return found


def _describe(name: str, maxima: Tensor) -> SiteMaxima:
    largest, channel = maxima.max(dim=0)
    return SiteMaxima(name, len(maxima), float(largest), int(channel), float(maxima.median()))


def quantizers(model: PreTrainedModel) -> dict[str, int]:
    """The number of linears for each combination of formats, rules and clips of weights and inputs, in words."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            inputs = "in 16 bit" if module.activations is None else module.activations.spelled
            found[f"weights {module.weights.spelled}, inputs {inputs}"] += 1
    return dict(found)


def attention_operands(model: PreTrainedModel) -> dict[str, int]:
    """The number of decoder blocks for each set of quantized operands of attention's products, in words."""
    return dict(Counter(found.spelled for module in model.modules() if (found := operands_of(module)) is not None))


def cache_schemes(model: PreTrainedModel) -> dict[str, int]:
    """The number of decoder blocks for each scheme of keys and values, in words. Empty if none are quantized."""
    return dict(Counter(found.spelled for module in model.modules() if (found := cache_scheme_of(module)) is not None))


def cache_table(model: PreTrainedModel) -> dict[str, Any] | None:
    """The scheme of a model's keys and values, in words, and its bits per element. None if they are not quantized."""
    scheme = cache_of(model)
    if scheme is None:
        return None
    width = value_heads(model.config.get_text_config())[1]
    return {"scheme": scheme.spelled, "bits_per_element": bits_per_element(scheme, width)}


CHOICE_ROWS = (1, 16, 128, 2048)


@dataclass(frozen=True)
class KernelChoice:
    """The kernel for the linears of one shape."""

    shape: tuple[int, int]
    """(N, K)."""
    linears: int
    """The number of these linears."""
    rows: int
    """The number of rows of the input."""
    path: str | None
    """The kernel. None for the plain path."""
    reason: str


def kernel_choices(model: PreTrainedModel) -> list[KernelChoice]:
    """For each shape of quantized linear and some numbers of input rows, the chosen kernel and the reason."""
    by_shape: dict[tuple[int, int], list[QuantLinear]] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            by_shape.setdefault((module.out_features, module.in_features), []).append(module)
    return [
        KernelChoice(shape, len(linears), rows, choice.path, choice.reason)
        for shape, linears in by_shape.items()
        for rows in CHOICE_ROWS
        for choice in (linears[0].choose_path(rows),)
    ]


def weight_exponents(model: PreTrainedModel, family: Family) -> dict[str, Tensor]:
    """The number of weight blocks with each scale 2^e, by the name of the site, int64 [256]. The first is e = -127.

    Experts count together. Sites without byte scales have no entry.
    """
    counts: dict[str, Tensor] = {}
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        for site in family.sites_of(index):
            for name in site.linears:
                linear = block.get_submodule(name)
                scales = dict(linear.named_parameters(recurse=False)).get("weight_scale")
                if isinstance(linear, QuantLinear) and scales is not None and scales.dtype == torch.uint8:
                    found = torch.bincount(scales.flatten().cpu(), minlength=256)
                    counts[site.group] = counts.get(site.group, 0) + found
    return counts
