"""Quantize one site: take its statistics, fit its transform, round its weights and replace its linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.calibration import (
    COLLECTORS,
    ONE,
    ChannelMaxima,
    Executor,
    LargestMagnitude,
    RowSample,
    World,
)
from mxrot.calibration.site_inputs import SiteInputs, watched_modules
from mxrot.calibration.site_weights import Rows, SiteWeights, together
from mxrot.cuda_graphs import Replays
from mxrot.errors import NumericsError
from mxrot.formats import QTensor
from mxrot.layers import QuantLinear
from mxrot.models import Family, Site, Source, value_heads
from mxrot.progress import Progress, silent
from mxrot.quantizing.finite import check_folded, check_rounded, check_statistics, check_transform, named_factorizations
from mxrot.quantizing.record import LinearReport
from mxrot.recipe import Recipe
from mxrot.rounding import Prepared
from mxrot.rules import Rules
from mxrot.scheme import Scheme, SiteScheme, fill_site, install_site
from mxrot.surgery import Weights, fold_into_producer, shareable_scales
from mxrot.transforms import SiteSample, SiteTransform, generator_for
from mxrot.transforms.smoothing import smoothing_scales

ERROR_ROWS = 512
"""Calibration tokens on which the output error of each linear is measured."""
ERROR_ELEMENTS = 1 << 24
"""Weights whose error is taken at once."""


@dataclass(frozen=True)
class BlockRun:
    """What stays the same from block to block."""

    recipe: Recipe
    source: Source
    device: torch.device
    dtype: torch.dtype
    """In which is computed."""
    seed: int
    scheme: Scheme
    replay: Replays = field(default_factory=Replays)
    world: World = ONE
    """The processes that the calibration windows are spread over."""

    @property
    def family(self) -> Family:
        return self.source.family

    @property
    def config(self) -> Any:
        return self.source.config

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of most weights."""
        return self.source.dtype

    def is_last(self, index: int) -> bool:
        """Does no decoder block follow block `index`?"""
        return bool(index + 1 == self.config.num_hidden_layers)

    def rounding_type(self, name: str) -> torch.dtype:
        """What a tensor that is changed here is rounded to: the type that it will be stored in, unless computing holds
        less."""
        own = self.source.types.get(name, self.stored_dtype)
        return own if own == self.stored_dtype or self.dtype.itemsize >= 4 else self.dtype

    def other_types_under(self, prefix: str) -> dict[str, torch.dtype]:
        """The types of tensors that are stored in another one and whose names start with `prefix` and a dot, by the
        rest of their names."""
        dotted = prefix + "."
        return {name[len(dotted) :]: own for name, own in self.source.types.items() if name.startswith(dotted)}

    @cached_property
    def rules(self) -> Rules:
        """The recipe for the sites of this model."""
        return Rules(self.recipe, self.family, self.config.num_hidden_layers)

    def active_sites(self, index: int) -> tuple[Site, ...]:
        """The sites of block `index` that are quantized."""
        return self.rules.active_sites(index)

    def of(self, part: Part, site: Site) -> tuple[Recipe, SiteScheme]:
        """By which rules a site is quantized, and what will be installed there."""
        return self.rules.of(part.index, site.name), self.scheme.linears[f"{part.name}.{site.linears[0]}"]


@dataclass(frozen=True)
class Part:
    """What holds sites: a decoder block, or one of its experts."""

    name: str
    index: int
    """Of the decoder block."""
    module: nn.Module
    weights: Weights
    """By their names in the module, as they were read; in float64 where smoothing has changed them."""
    executor: Executor | None
    """Runs the module; None where no data is looked at."""
    original: Executor | None = None
    """Runs that of the original model; None where neither rounding nor tuning asks for it."""


@dataclass(frozen=True)
class RoundedRows:
    """Some rows of a linear."""

    weight: QTensor
    lost: Tensor
    """The Frobenius norm of what the transformed weights have lost, a scalar."""
    norm: Tensor
    """That of the transformed weights."""
    remainder: Tensor | None
    """As in `RoundedLinear`."""


@dataclass(frozen=True)
class RoundedLinear:
    """A linear that is about to be replaced."""

    weight: QTensor
    error: Tensor
    """Relative Frobenius error of the transformed weights, a scalar."""
    damping: float | None
    remainder: Tensor | None
    """What rounding took away, bfloat16; None unless tuning follows."""
    tokens: int | None
    """That the Hessian is a mean over; None without one."""


def smoothed_sites(rules: Rules, index: int) -> list[Site]:
    """Sites of a block that get smoothing scales, with all their linears; none of which nothing is quantized."""
    if rules.recipe.smoothing is None:
        return []
    active = {site.name for site in rules.active_sites(index)}
    return [site for site in rules.family.sites if site.name in active and rules.smooths(site)]


def smooth_sites(run: BlockRun, part: Part, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Smoothing scales [K] by site name, from the inputs of the part as it was.

    With sharing "site" they are folded here, and what is returned is empty.
    """
    smoothing = run.recipe.smoothing
    if smoothing is None:
        return {}
    assert part.executor is not None
    maxima = {site.name: ChannelMaxima() for site in sites}
    part.executor.observe([(site.reader, maxima[site.name].update) for site in sites])
    heads = value_heads(run.config)
    found = {}
    for site in sites:
        seen = maxima[site.name].result(run.world)
        if not torch.isfinite(seen).all():
            raise NumericsError(f"{part.name}.{site.linears[0]}: its input holds NaN or Inf on the calibration text")
        scales = smoothing_scales(seen, together(part.weights, site.linears), smoothing.alpha)
        if run.rules.of(part.index, site.name).sharing == "block":
            found[site.name] = scales
        else:
            shared = shareable_scales(scales, site, heads)
            changed = f"{site.norm}.weight" if site.norm is not None else f"{site.producer}.bias"
            types = [run.rounding_type(f"{part.name}.{name}") for name in (changed, f"{site.router}.weight")]
            fold_into_producer(part.module, site, part.weights, shared, heads, *types)
            check_folded(part.module, part.name, site, types[0])
    for name, weight in part.weights.items():
        linear = part.module.get_submodule(name)
        assert isinstance(linear.weight, Tensor)
        linear.weight.data.copy_(weight.to(run.rounding_type(f"{part.name}.{name}.weight")))
    return found


def quantize_site(
    run: BlockRun, part: Part, site: Site, scales: Tensor | None, progress: Progress = silent
) -> list[LinearReport]:
    """Fit the site's transform, round its weights, and put quantized linears in place."""
    name = f"{part.name}.{site.linears[0]}"
    rows = RowSample(ERROR_ROWS)
    progress(0, 5, name)
    transform = fit_transform(run, part, site, scales, rows)
    progress(1, 5, name)  # with GPTQ most of the time goes into rounding, and the statistics for it
    return install_rounded(run, part, site, transform, round_site(run, part, site, transform), rows)


def fit_transform(
    run: BlockRun, part: Part, site: Site, scales: Tensor | None, rows: RowSample
) -> SiteTransform | None:
    """The site's transform as a checkpoint will hold it; None where nothing is applied at run time.

    With `sharing = "block"` it starts with the division by the smoothing scales. `rows` gets the raw inputs.
    """
    recipe, scheme = run.of(part, site)
    method, executor = recipe.transform, part.executor
    name = f"{part.name}.{site.linears[0]}"
    collectors = {}
    if executor is not None:
        collectors = {
            need: COLLECTORS[need](method.block, method.tokens_kept, executor.tokens, executor.tokens_before)
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
        batches = None if collectors else executor.batches[:1]
        keeps = requirements.hessian and site.experts is None
        for *_, x in executor.watch(watched_modules(site, requirements), batches, keeps):
            see(x)
        if not torch.isfinite(largest.result(run.world)):
            raise NumericsError(f"{name}: its input holds NaN or Inf on the calibration text")
    if not scheme.stages:
        return None
    smoothed = together(part.weights, site.linears)
    if scales is not None:
        smoothed = smoothed * scales
    seen = {need: collector.result(run.world) for need, collector in collectors.items()}
    check_statistics(seen, name)
    sample = SiteSample(smoothed, method.block, seen, scheme.activations, scheme.weights, run.replay)
    with named_factorizations(name):
        transform = SiteTransform.of(method.fit(sample, recipe.sharing, generator_for(run.seed, name)))
        if scales is not None:
            transform = transform.after_scaling(1 / scales)
        applied = transform.as_applied()
        check_transform(applied, name)
    return applied


def round_site(run: BlockRun, part: Part, site: Site, transform: SiteTransform | None) -> dict[str, RoundedLinear]:
    """Round the linears of a site, by their names, for the inputs of the part."""
    weights = SiteWeights(part.weights, site.linears, transform)
    recipe, scheme = run.of(part, site)
    groups = weights.whole_linears if scheme.weights.looks_at_whole_tensor else weights.groups
    hessian, shift = _statistics(run, part, site, weights)
    moves = [] if shift is None else [shift[rows.place] for rows in groups]
    prepared = recipe.rounding.prepare(hessian, moves, f"{part.name}.{site.linears[0]}")
    tokens = None if hessian is None or part.executor is None else part.executor.tokens
    del hessian  # what it has become is in `prepared`
    found: dict[str, list[RoundedRows]] = {linear: [] for linear in site.linears}
    for position, rows in enumerate(groups):
        for linear, piece in _round_rows(run, part, site, weights, rows, prepared, moves[position] if moves else None):
            found[linear].append(piece)
    return {linear: _together(pieces, prepared.damping, tokens) for linear, pieces in found.items()}


def _round_rows(
    run: BlockRun, part: Part, site: Site, weights: SiteWeights, rows: Rows, prepared: Prepared, move: Tensor | None
) -> list[tuple[str, RoundedRows]]:
    """Round some rows, which belong to the linears of these names."""
    recipe, scheme = run.of(part, site)
    folded = weights.folded(rows)
    name, quantizer = f"{part.name}.{weights.linears[0]}", scheme.weights
    result = recipe.rounding.round_rows(folded, quantizer.format, quantizer.rule, prepared, name, move)
    pieces = zip(
        rows.pieces,
        result.weight.split_rows(rows.counts),
        folded.split(rows.counts),
        result.remainder.split(rows.counts),
        strict=True,
    )
    found = []
    for (linear, _, _), weight, wanted, remainder in pieces:
        check_rounded(weight, wanted, f"{part.name}.{linear}")
        kept = None if recipe.tuning is None else remainder.to(torch.bfloat16)
        found.append((linear, RoundedRows(weight, *error_norms(weight, wanted), kept)))
    return found


def _statistics(run: BlockRun, part: Part, site: Site, weights: SiteWeights) -> tuple[Tensor | None, Tensor | None]:
    """The Hessian of a site [K, K], and the shift towards its target [N, K], where rounding asks for them."""
    recipe, scheme = run.of(part, site)
    requirements = recipe.rounding.requirements
    if not requirements.hessian:
        return None, None
    assert part.executor is not None
    seen = SiteInputs(part.executor, site, weights.transform, scheme.activations)
    shift = None
    if part.original is None or requirements.target == "own":
        hessian = seen.hessian(weights, requirements)
    else:
        hessian, shift = seen.hessian_and_shift(part.original, weights, requirements)
    part.executor.forget_inputs()
    return hessian, shift


def _together(pieces: Sequence[RoundedRows], damping: float | None, tokens: int | None) -> RoundedLinear:
    """The whole of a linear."""
    remainders = [piece.remainder for piece in pieces if piece.remainder is not None]
    return RoundedLinear(
        QTensor.one_above_other([piece.weight for piece in pieces]),
        _ratio(_norm([piece.lost for piece in pieces]), _norm([piece.norm for piece in pieces])),
        damping,
        torch.cat(remainders) if remainders else None,
        tokens,
    )


def error_norms(weight: QTensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The Frobenius norms of what `weight` [n, K] has lost of the `wanted`, and of that; some rows at a time."""
    counts = [len(rows) for rows in wanted.split(max(1, ERROR_ELEMENTS // max(1, wanted.shape[1])))]
    pieces = list(zip(weight.split_rows(counts), wanted.split(counts), strict=True))
    lost = [(rows.dequantize(torch.float64) - expected).norm() for rows, expected in pieces]
    return _norm(lost), _norm([expected.norm() for _, expected in pieces])


def _norm(norms: Sequence[Tensor]) -> Tensor:
    """That of a matrix, from those of its rows."""
    return norms[0] if len(norms) == 1 else torch.stack(list(norms)).norm()


def _ratio(lost: Tensor, norm: Tensor) -> Tensor:
    """A relative error, a scalar; what is lost itself where the norm is zero."""
    return torch.where(norm > 0, lost / norm, lost)


def install_rounded(
    run: BlockRun,
    part: Part,
    site: Site,
    transform: SiteTransform | None,
    rounded: dict[str, RoundedLinear],
    rows: RowSample,
) -> list[LinearReport]:
    """Put quantized linears in place; what they cost, on the inputs in `rows`."""
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
    errors = torch.stack(weight_errors + output_errors).tolist()  # one wait for the device
    return [
        LinearReport(
            f"{part.name}.{linear}",
            (part.weights[linear].shape[0], part.weights[linear].shape[1]),
            site.group,
            errors[position],
            errors[position + len(site.linears)] if output_errors else None,
            rounded[linear].damping,
            rounded[linear].tokens,
        )
        for position, linear in enumerate(site.linears)
    ]


def _output_error(block: nn.Module, linear: str, weight: Tensor, x: Tensor) -> Tensor:
    """Relative error of one installed linear on sampled inputs `x`, against its weights before quantization."""
    module = block.get_submodule(linear)
    assert isinstance(module, QuantLinear)
    bias = 0 if module.bias is None else module.bias
    expected = x.double() @ weight.double().t()
    return _ratio(((module(x) - bias).double() - expected).norm(), expected.norm())
