"""Quantize one decoder block: smooth it, then take its sites one after the other.

A site's statistics are taken, its transform fitted, its weights rounded and its linears replaced before the next
site is looked at. Smoothing scales come first, from one pass over the block as it was, because they must go into
layers that will be rounded before the site they serve.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.calibration import (
    COLLECTORS,
    BlockInputs,
    ChannelMaxima,
    LargestMagnitude,
    RowSample,
    advance,
    finish_child,
    observe_all_inputs,
    watched_together,
)
from mxrot.errors import NumericsError
from mxrot.formats import QTensor
from mxrot.hessian import OriginalBlock, SiteInputs, watched_modules
from mxrot.layers import QuantLinear, TensorQuantizer
from mxrot.models import Family, Site, WeightFiles, fill, value_heads
from mxrot.recipe import TRANSFORM_BLOCK, Recipe
from mxrot.records import BlockReport, LinearReport
from mxrot.replay import Replays
from mxrot.surgery import Weights, fold_into_producer, install_site, scheme_name, shareable_scales
from mxrot.transforms import BlockTransform, SiteSample, generator_for
from mxrot.transforms.smoothing import smoothing_scales
from mxrot.tuning import Check, tune_block

ERROR_ROWS = 512
"""Calibration tokens on which the output error of each linear is measured."""


@dataclass(frozen=True)
class BlockRun:
    """What stays the same from block to block."""

    recipe: Recipe
    family: Family
    config: Any
    device: torch.device
    stored_dtype: torch.dtype
    dtype: torch.dtype
    seed: int
    replay: Replays = field(default_factory=Replays)

    def is_last(self, index: int) -> bool:
        """Does no decoder block follow block `index`?"""
        return bool(index + 1 == self.config.num_hidden_layers)

    @property
    def weights(self) -> TensorQuantizer:
        return self.recipe.weights.quantizer()

    @property
    def activations(self) -> TensorQuantizer | None:
        return None if self.recipe.activations is None else self.recipe.activations.quantizer()


def quantize_block(
    run: BlockRun,
    index: int,
    block: nn.Module,
    files: WeightFiles,
    inputs: BlockInputs | None,
    originals: BlockInputs | None,
) -> BlockReport:
    """Load one block, and quantize its sites one after the other.

    `originals` are the block's inputs in the original model, which are replaced by its outputs there, if another block
    follows; None where neither rounding nor tuning asks for them.
    """
    started = time.monotonic()
    prefix = run.family.block_prefix(index)
    tensors = files.read_under(prefix, run.device)
    linears = [linear for site in run.family.sites for linear in site.linears]
    weights: Weights = {name: tensors[f"{name}.weight"].double() for name in linears if f"{name}.weight" in tensors}
    fill_original(run, block, tensors, prefix)

    sites = run.family.active_sites(index, run.recipe.ignore)
    scales = {} if inputs is None else _smooth_block(run, index, block, weights, inputs)
    original = None if originals is None else OriginalBlock(deepcopy(block), originals)
    for streams in (inputs, originals):
        if streams is not None:
            streams.readers = _readers(run.family)
            streams.known = {name: {} for name in streams.readers}
    reports = []
    for position, site in enumerate(sites):
        finished = _children_of([site]) - _children_of(sites[position + 1 :])
        if originals is not None:
            originals.known |= {name: {} for name in finished - originals.known.keys()}
        if inputs is not None:
            inputs.last_linear = site.linears[0] if finished and len(site.linears) == 1 else None
        reports += _quantize_site(run, index, block, site, weights, scales.get(site.name), inputs, original)
        if inputs is not None:
            inputs.known |= {name: {} for name in finished - inputs.known.keys()}
            finish_child(block, inputs)
    checks = _tune(run, index, block, sites, inputs, original)
    if original is not None and not run.is_last(index):
        advance(original.block, original.inputs, f"{prefix} of the original model")
    return BlockReport(index, round(time.monotonic() - started, 3), reports, checks)


def _tune(
    run: BlockRun,
    index: int,
    block: nn.Module,
    sites: Sequence[Site],
    inputs: BlockInputs | None,
    original: OriginalBlock | None,
) -> list[Check] | None:
    """Tune the whole block, where the recipe says so; the losses."""
    tuning = run.recipe.tuning
    if tuning is None or tuning.scope != "block" or not sites:
        return None
    assert inputs is not None and original is not None
    inputs.known = {}
    name = run.family.block_prefix(index)
    generator = generator_for(run.seed, f"{name} tuning")
    return tune_block(block, inputs, original.block, original.inputs, sites, tuning, generator, name)


def _children_of(sites: Sequence[Site]) -> frozenset[str]:
    """The direct submodules of a block that hold the linears of `sites`."""
    return frozenset(linear.split(".")[0] for site in sites for linear in site.linears)


def _readers(family: Family) -> dict[str, frozenset[str]]:
    """Of each norm that sites read, the direct submodules of a block that read it."""
    norms = {site.norm for site in family.sites if site.norm is not None}
    return {norm: _children_of([site for site in family.sites if site.norm == norm]) for norm in sorted(norms)}


def fill_original(run: BlockRun, block: nn.Module, tensors: Weights, prefix: str) -> None:
    """Give a block without weights those of the original model."""
    # Through the stored type: a norm of another type would be rounded to it in a checkpoint.
    fill(block, {name: value.to(run.stored_dtype).to(run.dtype) for name, value in tensors.items()}, prefix)


def advance_original(run: BlockRun, index: int, block: nn.Module, files: WeightFiles, originals: BlockInputs) -> None:
    """Replace the inputs of a block in the original model by its outputs; `block` has no weights yet."""
    prefix = run.family.block_prefix(index)
    original = deepcopy(block)
    fill_original(run, original, files.read_under(prefix, run.device), prefix)
    advance(original, originals, f"{prefix} of the original model")


def _smooth_block(
    run: BlockRun, index: int, block: nn.Module, weights: Weights, inputs: BlockInputs
) -> dict[str, Tensor]:
    """Smoothing scales [K] by site name, from the inputs of the block as it was.

    With sharing "site" they are folded here, and what is returned is empty.
    """
    smoothing = run.recipe.smoothing
    if smoothing is None:
        return {}
    prefix = run.family.block_prefix(index)
    sites = smoothed_sites(run.recipe, run.family, index)
    maxima = {site.name: ChannelMaxima() for site in sites}
    observe_all_inputs(block, [(site.linears[0], maxima[site.name].update) for site in sites], inputs)
    heads = value_heads(run.config)
    found = {}
    for site in sites:
        seen = maxima[site.name].result()
        if not torch.isfinite(seen).all():
            raise NumericsError(f"{prefix}.{site.linears[0]}: its input holds NaN or Inf on the calibration text")
        scales = smoothing_scales(seen, torch.cat([weights[name] for name in site.linears]), smoothing.alpha)
        if run.recipe.sharing == "block":
            found[site.name] = scales
        else:
            fold_into_producer(block, site, weights, shareable_scales(scales, site, heads), heads, run.stored_dtype)
    for name, weight in weights.items():
        linear = block.get_submodule(name)
        assert isinstance(linear.weight, Tensor)
        linear.weight.data.copy_(weight.to(run.stored_dtype))
    return found


def smoothed_sites(recipe: Recipe, family: Family, index: int) -> list[Site]:
    """Sites of a block that get smoothing scales, with all their linears; none of which nothing is quantized."""
    if recipe.smoothing is None:
        return []
    active = {site.name for site in family.active_sites(index, recipe.ignore)}
    return [site for site in family.sites if site.name in active and site.name not in recipe.smoothing.skip]


def _quantize_site(
    run: BlockRun,
    index: int,
    block: nn.Module,
    site: Site,
    weights: Weights,
    scales: Tensor | None,
    inputs: BlockInputs | None,
    original: OriginalBlock | None,
) -> list[LinearReport]:
    """Fit the site's transform, round its weights, and put quantized linears in place."""
    prefix = run.family.block_prefix(index)
    name = f"{prefix}.{site.linears[0]}"
    rows = RowSample(ERROR_ROWS)
    transform = _fit_transform(run, name, block, site, weights, scales, inputs, rows)
    folded = {
        linear: weights[linear] if transform is None else transform.fold(weights[linear]) for linear in site.linears
    }
    hessian = shift = None
    wishes = run.recipe.rounding.wishes
    if wishes.hessian:
        assert inputs is not None
        seen = SiteInputs(block, site, inputs, transform, run.activations)
        whole = torch.cat([weights[linear] for linear in site.linears])
        if original is None or wishes.target == "own":
            hessian = seen.hessian(whole, wishes)
        else:
            hessian, shift = seen.hessian_and_shift(original, whole, torch.cat(list(folded.values())), wishes)
        inputs.kept = {}
    quantized, damping, remainders = _round_site(run, folded, hessian, shift, name)
    stored = None if transform is None else transform.to_stored()
    install_site(block, scheme_name(index, site), site, quantized, stored, run.weights, run.activations)
    if run.recipe.tuning is not None:
        for linear in site.linears:
            module = block.get_submodule(linear)
            assert isinstance(module, QuantLinear)
            module.remainder = remainders[linear].to(torch.bfloat16)
    weight_errors = [_relative_error(quantized[name].dequantize(torch.float64), folded[name]) for name in site.linears]
    output_errors = [] if inputs is None else [_output_error(block, x, weights[x], rows) for x in site.linears]
    found = torch.stack(weight_errors + output_errors).tolist()  # one wait for the device
    return [
        LinearReport(
            f"{prefix}.{linear}",
            (folded[linear].shape[0], folded[linear].shape[1]),
            site.name,
            found[position],
            found[position + len(site.linears)] if output_errors else None,
            damping,
        )
        for position, linear in enumerate(site.linears)
    ]


def _round_site(
    run: BlockRun, folded: Weights, hessian: Tensor | None, shift: Tensor | None, name: str
) -> tuple[dict[str, QTensor], float | None, Weights]:
    """Round the linears of a site, all at once unless a scale looks at the whole tensor.

    Codes and scales, the damping used, and what rounding took away.
    """
    rule, format = run.weights.rule, run.weights.format
    rows = [len(weight) for weight in folded.values()]
    if rule.looks_at_whole_tensor(format.scale):
        shifts = [None] * len(rows) if shift is None else list(shift.split(rows))
        results = {
            linear: run.recipe.rounding.round(weight, format, rule, hessian, name, part)
            for (linear, weight), part in zip(folded.items(), shifts, strict=True)
        }
        return (
            {linear: result.weight for linear, result in results.items()},
            next(iter(results.values())).damping,
            {linear: result.remainder for linear, result in results.items()},
        )
    result = run.recipe.rounding.round(torch.cat(list(folded.values())), format, rule, hessian, name, shift)
    parts = result.weight.split_rows(rows)
    remainders = dict(zip(folded, result.remainder.split(rows), strict=True))
    return dict(zip(folded, parts, strict=True)), result.damping, remainders


def _fit_transform(
    run: BlockRun,
    name: str,
    block: nn.Module,
    site: Site,
    weights: Weights,
    scales: Tensor | None,
    inputs: BlockInputs | None,
    rows: RowSample,
) -> BlockTransform | None:
    """The site's transform as a checkpoint will hold it; None where nothing is applied at run time.

    With `sharing = "block"` it starts with the division by the smoothing scales. `rows` gets the raw inputs.
    """
    method = run.recipe.transform
    collectors = {}
    if inputs is not None:
        rows_wanted = getattr(method, "rows", 0)
        collectors = {
            need: COLLECTORS[need](TRANSFORM_BLOCK, rows_wanted, inputs.tokens) for need in sorted(method.needs)
        }
        largest = LargestMagnitude()
        inverse = None if scales is None else (1 / scales).to(torch.float32)

        def see(x: Tensor) -> None:
            largest.update(x)
            rows.update(x)
            for collector in collectors.values():
                collector.update(x if inverse is None else x * inverse)

        wishes = run.recipe.rounding.wishes
        batches = None if collectors else [0]
        for *_, x in watched_together(block, inputs, watched_modules(site, wishes), batches, keeps=wishes.hessian):
            see(x)
        if not torch.isfinite(largest.result()):
            raise NumericsError(f"{name}: its input holds NaN or Inf on the calibration text")
    if not run.recipe.has_transform:
        return None
    smoothed = torch.cat([weights[linear] for linear in site.linears])
    if scales is not None:
        smoothed = smoothed * scales
    seen = {need: collector.result() for need, collector in collectors.items()}
    sample = SiteSample(smoothed, TRANSFORM_BLOCK, seen, run.activations, run.weights, run.replay)
    transform = method.fit(sample, run.recipe.sharing, generator_for(run.seed, name))
    if scales is not None:
        transform = BlockTransform.diagonal(1 / scales, TRANSFORM_BLOCK).compose(transform)
    return transform.as_applied()


def _output_error(block: nn.Module, linear: str, weight: Tensor, rows: RowSample) -> Tensor:
    """Relative error of one installed linear on sampled inputs, against its weights before quantization."""
    module = block.get_submodule(linear)
    assert isinstance(module, QuantLinear)
    x = rows.result()
    bias = 0 if module.bias is None else module.bias
    return _relative_error((module(x) - bias).double(), x.double() @ weight.t())


def _relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """||found - expected|| / ||expected||, a scalar; 0 where both are zero."""
    norm = expected.norm()
    return torch.where(norm > 0, (found - expected).norm() / norm, found.norm())
