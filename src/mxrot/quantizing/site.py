"""Quantize one site: take its statistics, fit its transform, round its weights and replace its linears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mxrot.calibration import (
    COLLECTORS,
    ChannelMaxima,
    ChannelSquares,
    LargestMagnitude,
    RowSample,
)
from mxrot.calibration.site_inputs import watched_modules
from mxrot.calibration.site_weights import to_fit_to, together
from mxrot.errors import NumericsError
from mxrot.layers import QuantLinear
from mxrot.models import Site, value_heads
from mxrot.progress import Progress, silent
from mxrot.quantizing.finite import check_folded, check_statistics, check_transform, named_factorizations
from mxrot.quantizing.input_scales import within_e5m2
from mxrot.quantizing.part import BlockRun, Part
from mxrot.quantizing.record import LinearReport
from mxrot.quantizing.refit import refitted
from mxrot.quantizing.rounded import RoundedLinear, error_ratio, round_site
from mxrot.quantizing.shared import by_itself, each_of, is_one_each
from mxrot.rules import Rules
from mxrot.scheme import fill_site, install_site
from mxrot.surgery import fold_into_producer, shareable_scales
from mxrot.transforms import SiteSample, SiteTransform, generator_for
from mxrot.transforms.smoothing import moment_scales, smoothing_scales

ERROR_ROWS = 512
"""The number of calibration tokens on which the output error of each linear is measured."""
MEASURED = ("weight_error", "output_error", "damping", "tokens", "target_strength")
"""The fields of a linear's report that are unknown before it is quantized."""


def smoothed_sites(rules: Rules, index: int) -> list[Site]:
    """The sites of a block that get smoothing scales, with all their linears. Sites without quantized linears are left
    out."""
    if rules.recipe.smoothing is None:
        return []
    active = {site.name for site in rules.active_sites(index)}
    return [site for site in rules.family.sites_of(index) if site.name in active and rules.smooths(site)]


def smooth_sites(run: BlockRun, part: Part, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The smoothing scales [K] by site name, from the inputs of the part as it was.

    With sharing "site" they are folded here, and the result is empty.
    """
    smoothing = run.recipe.smoothing
    if smoothing is None:
        return {}
    assert part.executor is not None
    kind, scales_of = (ChannelMaxima, smoothing_scales) if smoothing.by == "maxima" else (ChannelSquares, moment_scales)
    statistics = {site.name: kind() for site in sites}
    part.executor.observe([(site.reader, statistics[site.name].update) for site in sites], part.executor.fitted)
    heads = value_heads(run.config)
    found = {}
    for site in sites:
        seen = statistics[site.name].result(run.world)
        if not torch.isfinite(seen).all():
            raise NumericsError(f"{part.name}.{site.linears[0]}: its input holds NaN or Inf on the calibration text")
        scales = scales_of(seen, together(part.weights, site.linears), smoothing.alpha)
        if run.rules.of(part.index, site.name).sharing == "block":
            found[site.name] = scales
        else:
            shared = shareable_scales(scales, site, heads, smoothing.by)
            changed = f"{site.norm}.weight" if site.norm is not None else f"{site.producer}.bias"
            dtype = run.rounding_type(f"{part.name}.{changed}")
            routers = {name: run.rounding_type(f"{part.name}.{name}.weight") for name in site.routers}
            fold_into_producer(part.module, site, part.weights, shared, heads, dtype, routers)
            check_folded(part.module, part.name, site, dtype)
    for name, weight in part.weights.items():
        linear = part.module.get_submodule(name)
        assert isinstance(linear.weight, Tensor)
        linear.weight.data.copy_(weight.to(run.rounding_type(f"{part.name}.{name}.weight")))
    return found


def quantize_site(
    run: BlockRun, part: Part, site: Site, scales: Tensor | None, progress: Progress = silent
) -> list[LinearReport]:
    """Fit the site's transform, round its weights, and install the quantized linears."""
    rows, name = RowSample(ERROR_ROWS), f"{part.name}.{site.linears[0]}"
    progress(0, 5, name)
    transform = fit_transform(run, part, site, scales, rows)
    progress(1, 5, name)  # with GPTQ most of the time goes into rounding and its statistics
    rounded = round_site(run, part, site, transform)
    if run.beside is not None:
        run.beside(run, part, site, scales)
    return install_rounded(run, part, site, refitted(run, part, site, transform, rounded), rounded, rows)


def quantize_sites(
    run: BlockRun,
    places: Sequence[tuple[Part, Site]],
    scales: Sequence[Tensor | None],
    progress: Progress = silent,
) -> list[LinearReport]:
    """`quantize_site` for sites of several parts, as `round_sites` takes them, each with its smoothing scales."""
    if not is_one_each([site for _, site in places], run.world):
        each = zip(places, scales, strict=True)
        return [report for (part, site), own in each for report in quantize_site(run, part, site, own, progress)]
    alone, part = by_itself(run, [part for part, _ in places])
    own = quantize_site(alone, part, places[run.world.rank][1], scales[run.world.rank], progress)
    return _installed_by_each(run, places, own)


def fit_transform(
    run: BlockRun, part: Part, site: Site, scales: Tensor | None, rows: RowSample
) -> SiteTransform | None:
    """The site's transform as a checkpoint will hold it; None if nothing is applied at run time.

    With `sharing = "block"` it starts with the division by the smoothing scales. `rows` collects the raw inputs.
    """
    recipe, scheme = run.of(part, site)
    method, executor = recipe.transform.beside(recipe.rounding.mends_later_columns), part.executor
    name = f"{part.name}.{site.linears[0]}"
    block = method.block_in(part.weights[site.linears[0]].shape[1])
    collectors = {}
    if executor is not None:
        collectors = {
            need: COLLECTORS[need](block, method.tokens_kept, executor.tokens, executor.tokens_before)
            for need in sorted(method.needs)
        }
        largest = LargestMagnitude()
        inverse = None if scales is None else (1 / scales).to(torch.float32)

        def see(x: Tensor) -> None:
            largest.update(x)
            rows.update(x)
            for collector in collectors.values():
                collector.update(x if inverse is None else x * inverse)

        requirements = recipe.rounding.requirements
        batches = executor.fitted if collectors else executor.batches[:1]
        keeps = requirements.hessian and site.experts is None
        for *_, x in executor.watch(watched_modules(site, requirements), batches, keeps):
            see(x)
        if not torch.isfinite(largest.result(run.world)):
            raise NumericsError(f"{name}: its input holds NaN or Inf on the calibration text")

    def own_weights() -> Tensor:
        return together(part.weights, site.linears)

    if not scheme.stages:
        if executor is not None:
            within_e5m2(None, rows.result(run.world), scheme, name, own_weights)
        return None
    weights = to_fit_to(part.weights, site.linears, scales)
    seen = {need: collectors.pop(need).result(run.world) for need in list(collectors)}  # and frees their sums
    check_statistics(seen, name)
    sample = SiteSample(weights, block, seen, scheme.activations, scheme.weights, run.replay)
    with named_factorizations(name):
        transform = SiteTransform.of(method.fit(sample, recipe.sharing, generator_for(run.seed, name)))
        if scales is not None:
            transform = transform.after_scaling(1 / scales)
        applied = transform.as_applied()
        check_transform(applied, name)
    return applied if executor is None else within_e5m2(applied, rows.result(run.world), scheme, name, own_weights)


def install_rounded(
    run: BlockRun,
    part: Part,
    site: Site,
    transform: SiteTransform | None,
    rounded: dict[str, RoundedLinear],
    rows: RowSample,
) -> list[LinearReport]:
    """Install the quantized linears. Returns their errors on the inputs in `rows`."""
    quantized = {linear: found.weight for linear, found in rounded.items()}
    _, scheme = run.of(part, site)
    install_site(part.module, part.index, site, scheme)
    fill_site(part.module, site, quantized, transform)
    for linear, found in rounded.items():
        module = part.module.get_submodule(linear)
        assert isinstance(module, QuantLinear)
        module.remainder = found.remainder
    weight_errors = [rounded[linear].error for linear in site.linears]
    output_errors = []
    if part.executor is not None:
        sample = rows.result(run.world)
        output_errors = [_output_error(part.module, x, part.weights[x], sample) for x in site.linears]
    errors = torch.stack(weight_errors + output_errors).tolist()  # waits for the device once
    return [
        LinearReport(
            f"{part.name}.{linear}",
            (part.weights[linear].shape[0], part.weights[linear].shape[1]),
            site.group,
            errors[position],
            errors[position + len(site.linears)] if output_errors else None,
            rounded[linear].damping,
            rounded[linear].tokens,
            rounded[linear].target_strength,
        )
        for position, linear in enumerate(site.linears)
    ]


def _installed_by_each(
    run: BlockRun, places: Sequence[tuple[Part, Site]], reports: list[LinearReport]
) -> list[LinearReport]:
    """Install the site that each process has rounded. Returns the reports of all of them, by rank."""
    part, site = places[run.world.rank]
    measured = [[getattr(report, name) for name in MEASURED] for report in reports]
    told = torch.tensor([[math.nan if x is None else x for x in row] for row in measured], dtype=torch.float64)
    linears = _quantized(part, site)
    own = [tensor.data for linear in linears for tensor in linear.parameters()]
    remainders = [linear.remainder for linear in linears if linear.remainder is not None]
    found = []
    for rank, values in enumerate(each_of([told.to(run.device), *own, *remainders], run.world)):
        part, site = places[rank]
        rows = next(values).tolist()
        if rank != run.world.rank:
            install_site(part.module, part.index, site, run.of(part, site)[1])
            linears = _quantized(part, site)
            for tensor in [tensor for linear in linears for tensor in linear.parameters()]:
                tensor.data = next(values)
            for linear in linears if remainders else ():
                linear.remainder = next(values)
        for report, name, row in zip(reports, site.linears, rows, strict=True):
            changes: dict[str, Any] = {key: None if math.isnan(x) else x for key, x in zip(MEASURED, row, strict=True)}
            if changes["tokens"] is not None:
                changes["tokens"] = int(changes["tokens"])
            found.append(replace(report, name=f"{part.name}.{name}", **changes))
    return found


def _quantized(part: Part, site: Site) -> list[QuantLinear]:
    """The linears of an installed site."""
    return [cast(QuantLinear, part.module.get_submodule(linear)) for linear in site.linears]


def _output_error(block: nn.Module, linear: str, weight: Tensor, x: Tensor) -> Tensor:
    """The relative error of one installed linear on sampled inputs `x`, against its weights before quantization."""
    module = block.get_submodule(linear)
    assert isinstance(module, QuantLinear)
    bias = 0 if module.bias is None else module.bias
    expected = x.double() @ weight.double().t()
    return error_ratio(((module(x) - bias).double() - expected).norm(), expected.norm())
