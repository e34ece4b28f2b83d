"""Quantize one decoder block: fit its cache, smooth it, then take its sites one after the other.

For each site, statistics are taken, the transform fitted, the weights rounded and the linears replaced before the next
site. Smoothing scales come first, from one pass over the block as it was, because they are folded into layers that are
rounded before the site they serve.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from mxrot.calibration import Executor
from mxrot.heap import give_back
from mxrot.layers import cache_scheme_of, restore_attention, restore_cache
from mxrot.models import Family, Site, fill
from mxrot.progress import Progress, part_of, silent
from mxrot.quantizing.cache import fit_block
from mxrot.quantizing.experts import quantize_experts, smooth_experts
from mxrot.quantizing.part import BlockRun, Part
from mxrot.quantizing.record import BlockReport, LinearReport
from mxrot.quantizing.site import quantize_site, smooth_sites, smoothed_sites
from mxrot.surgery import Weights, stored_tensors
from mxrot.transforms import generator_for
from mxrot.tuning import Check, tune_block

TUNING_SHARE = 0.8
"""Tuning's rough share of the time for a block tuned by itself."""


def quantize_block(
    run: BlockRun,
    index: int,
    block: nn.Module,
    executor: Executor | None,
    original: Executor | None,
    progress: Progress = silent,
) -> BlockReport:
    """Load one block, and quantize its sites one after the other.

    `executor` then runs it, up to the start of the next block; None if no data is used. `original` runs the block of
    the original model, and goes on to the next; None if neither rounding nor tuning needs it. `progress` is reported in
    weights of the block.
    """
    started = time.monotonic()
    prefix = run.family.block_prefix(index)
    weights = _load(run, index, block, executor, run.source.block(index, run.device))

    sites = run.active_sites(index)
    scales = {}
    if executor is not None:
        executor.begin(block)
        scales = _smooth_block(run, index, Part(prefix, index, block, weights, executor))
        executor.begin(block, _readers(run.family.sites_of(index)))
    if original is not None:
        original.begin(copy_of(run, block), _readers(run.family.sites_of(index)))
    part = Part(prefix, index, block, weights, executor, original)
    reports: list[LinearReport] = []
    few_tokens: dict[str, int] = {}
    rounding = progress
    if run.recipe.tunes_blocks:
        rounding = part_of(progress, 0, 1 - TUNING_SHARE, 1)
    told = _by_weights(rounding, prefix, weights, sites)
    of_experts = [site for site in sites if site.is_of_experts]
    for position, site in enumerate(sites):
        if site.is_of_experts:
            if site is of_experts[0] and run.family.experts is not None:
                found, few_tokens = quantize_experts(run, part, run.family.experts.place, of_experts, scales, told)
                reports += found
                give_back()
            continue
        finished = _children_of([site]) - _children_of(sites[position + 1 :])
        if original is not None:
            original.children_done(finished)
        if executor is not None:
            executor.expect_last(site.linears[0] if finished and len(site.linears) == 1 else None)
        reports += quantize_site(run, part, site, scales.get(site.name), told[site.name])
        if executor is not None:
            executor.children_done(finished)
        give_back()
    checks = _tune(run, part, sites, part_of(progress, 1 - TUNING_SHARE, TUNING_SHARE, 1))
    if original is not None and run.is_last(index):
        original.end()
    elif original is not None:
        original.advance(f"{prefix} of the original model")
    return BlockReport(index, round(time.monotonic() - started, 3), reports, checks, few_tokens)


def _load(run: BlockRun, index: int, block: nn.Module, executor: Executor | None, tensors: Weights) -> Weights:
    """Fill a block and, if the recipe has them, fit the transforms of its cache. Returns the weights of its linears."""
    prefix = run.family.block_prefix(index)
    weights = linear_weights(run.family, tensors)
    fill_original(run, block, tensors, prefix)
    if run.recipe.fits_cache and run.family.attends(index):
        fit_block(run, Part(prefix, index, block, weights, executor))
    return weights


def linear_weights(family: Family, tensors: Weights) -> Weights:
    """The weights of the linears of all sites among a block's tensors, by their names in the block."""
    linears = [linear for site in family.sites for linear in site.linears]
    return {name: tensors[f"{name}.weight"] for name in linears if f"{name}.weight" in tensors}


def _tune(run: BlockRun, part: Part, sites: Sequence[Site], progress: Progress) -> list[Check] | None:
    """Tune the whole block if the recipe says so. Returns the losses."""
    tuning = run.recipe.tuning
    if tuning is None or tuning.scope != "block" or not sites:
        return None
    assert part.executor is not None and part.original is not None
    part.executor.begin(part.module)
    generator = generator_for(run.seed, f"{part.name} tuning")
    return tune_block(
        part.executor,
        part.original,
        sites,
        tuning,
        generator,
        part.name,
        run.family,
        run.rounding_type,
        progress,
        run.watch.without_limit(),
    )


def _by_weights(progress: Progress, prefix: str, weights: Weights, sites: Sequence[Site]) -> dict[str, Progress]:
    """A progress callback for each site, by name. Its share of the work is its share of the weights."""
    sizes = [sum(weights[linear].numel() for linear in site.linears) for site in sites]
    begins = [sum(sizes[:position]) for position in range(len(sites))]
    return {
        site.name: part_of(progress, begin, size, sum(sizes))
        for site, begin, size in zip(sites, begins, sizes, strict=True)
    }


def _children_of(sites: Sequence[Site]) -> frozenset[str]:
    """The direct submodules of a block that hold the linears of `sites`."""
    return frozenset(linear.split(".")[0] for site in sites for linear in site.linears)


def _readers(sites: Sequence[Site]) -> dict[str, frozenset[str]]:
    """For each norm that sites of a block read, the direct submodules of the block that read it."""
    norms = {site.norm for site in sites if site.norm is not None}
    return {norm: _children_of([site for site in sites if site.norm == norm]) for norm in sorted(norms)}


def fill_original(run: BlockRun, block: nn.Module, tensors: Weights, prefix: str) -> None:
    """Fill an empty block with the original's tensors. The matrices of a quantized cache are set to change nothing."""
    own = {name: value.to(run.family.dtype_of(name, run.dtype)) for name, value in tensors.items()}
    for place, module in block.named_modules():
        cache = cache_scheme_of(module)
        for name in () if cache is None else cache.stored_names:
            shape = module.get_parameter(name).shape
            own[f"{place}.{name}"] = torch.eye(shape[-1], device=run.device).expand(shape).clone()
    fill(block, own, prefix)


def finished_tensors(run: BlockRun, index: int, block: nn.Module) -> dict[str, Tensor]:
    """The tensors of a quantized block for a checkpoint. Those not quantized keep their own type and, if nothing
    changed them, the bits of the source."""
    prefix = run.family.block_prefix(index)
    own = run.other_types_under(prefix)
    found = stored_tensors(block, run.stored_dtype, own)
    state = {name: value for name, value in block.state_dict().items() if name in own}
    original = run.source.block(index, run.device, state.keys()) if state else {}
    unchanged = [name for name, value in original.items() if torch.equal(value.to(state[name].dtype), state[name])]
    return found | {name: original[name] for name in unchanged}


def advance_original(
    run: BlockRun, index: int, block: nn.Module, executor: Executor | None, original: Executor
) -> None:
    """Move the original model on past a block. `block` has no weights yet, and `executor` stands before it."""
    prefix = run.family.block_prefix(index)
    tensors = run.source.block(index, run.device)
    if run.recipe.fits_cache:  # again, for the exact bits of the weights around the values
        whole = deepcopy(block, {id(run.config): run.config})
        _load(run, index, whole, executor, tensors)
        own = copy_of(run, whole)
    else:
        own = copy_of(run, block)
        fill_original(run, own, tensors, prefix)
    original.begin(own)
    original.advance(f"{prefix} of the original model")


def copy_of(run: BlockRun, block: nn.Module) -> nn.Module:
    """A copy of the block with its own tensors and transformers' attention. Its config is shared."""
    found = deepcopy(block, {id(run.config): run.config})
    for module in found.modules():
        restore_attention(module)
        restore_cache(module)
    return found


def _smooth_block(run: BlockRun, index: int, part: Part) -> dict[str, Tensor]:
    """The smoothing scales [K] of all sites of a block by site name, as `smooth_sites` gives them."""
    sites = smoothed_sites(run.rules, index)
    inside = [site for site in sites if site.expert is not None]
    scales = smooth_sites(run, part, [site for site in sites if site.expert is None])
    if run.family.experts is not None and inside:
        scales |= smooth_experts(run, part, run.family.experts.place, inside)
    return scales
