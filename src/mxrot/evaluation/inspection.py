"""What is in a model: channel maxima of its sites, exponents of its weights, and what computes its linears."""

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
    """How far the largest channel of a site sticks out."""

    site: str
    """Full name of the first linear of the site."""
    channels: int
    largest: float
    """max |x| over tokens and channels."""
    channel: int
    """Where the largest is."""
    median: float
    """Median over channels of the channel maxima."""

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

    Of sites that the experts of a block have one each of, that with the largest ratio. Experts of `model` get linears
    of their own.
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
    """How many linears have which formats, rules and clips of weights and inputs, which are spelled out."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            inputs = "in 16 bit" if module.activations is None else module.activations.spelled
            found[f"weights {module.weights.spelled}, inputs {inputs}"] += 1
    return dict(found)


def attention_operands(model: PreTrainedModel) -> dict[str, int]:
    """How many decoder blocks quantize which operands of attention's products, which are spelled out."""
    return dict(Counter(found.spelled for module in model.modules() if (found := operands_of(module)) is not None))


def cache_schemes(model: PreTrainedModel) -> dict[str, int]:
    """How many decoder blocks keep keys and values in which way, which is spelled out; none where they are as they
    are."""
    return dict(Counter(found.spelled for module in model.modules() if (found := cache_scheme_of(module)) is not None))


def cache_table(model: PreTrainedModel) -> dict[str, Any] | None:
    """How a model keeps keys and values, in words, and bits an element; None where they are as they are."""
    scheme = cache_of(model)
    if scheme is None:
        return None
    width = value_heads(model.config.get_text_config())[1]
    return {"scheme": scheme.spelled, "bits_per_element": bits_per_element(scheme, width)}


CHOICE_ROWS = (1, 16, 128, 2048)


@dataclass(frozen=True)
class KernelChoice:
    """What computes the linears of one shape."""

    shape: tuple[int, int]
    """(N, K)."""
    linears: int
    """How many there are."""
    rows: int
    """Rows of the input."""
    path: str | None
    """None for the plain path."""
    reason: str


def kernel_choices(model: PreTrainedModel) -> list[KernelChoice]:
    """For each shape of quantized linear and some numbers of input rows, which kernel computes it and why."""
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
    """How many blocks of weights have each scale 2^e, by the name of the site: int64 [256], the first is e = -127.

    Those of all experts count together. Sites without scales of a byte have no entry.
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
