"""Round the weights of a site: statistics once, then the rows, in groups if there are many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from mxrot.calibration import World
from mxrot.calibration.executor import HELD
from mxrot.calibration.site_inputs import SiteInputs
from mxrot.calibration.site_weights import Rows, SiteWeights
from mxrot.formats import QTensor
from mxrot.models import Site
from mxrot.quantizing.finite import check_rounded
from mxrot.quantizing.part import BlockRun, Part
from mxrot.quantizing.shared import by_itself, each_of, gathered, gathered_rows, is_one_each, shares
from mxrot.rounding import Prepared, RoundingMethod
from mxrot.rounding.base import Requirements
from mxrot.rounding.held_out import Fold, Moments
from mxrot.transforms import SiteTransform

ERROR_ELEMENTS = 1 << 24
"""The weights whose error is computed at once."""


@dataclass(frozen=True)
class RoundedRows:
    """Some rounded rows of a linear."""

    weight: QTensor
    lost: Tensor
    """The Frobenius norm of the error of the transformed weights, a scalar."""
    norm: Tensor
    """The norm of the transformed weights."""
    remainder: Tensor | None
    """As in `RoundedLinear`."""


@dataclass(frozen=True)
class RoundedLinear:
    """A rounded linear before its replacement."""

    weight: QTensor
    error: Tensor
    """Relative Frobenius error of the transformed weights, a scalar."""
    damping: float | None
    remainder: Tensor | None
    """Each weight minus its rounded value, bfloat16; None unless tuning follows."""
    tokens: int | None
    """The number of tokens in the mean of the Hessian; None without one."""
    target_strength: float | None = None
    """As in `LinearReport`."""


@dataclass(frozen=True)
class SiteStatistics:
    """The statistics of a site before its weights are rounded; the same in all processes."""

    weights: SiteWeights
    method: RoundingMethod
    """The rounding method of the recipe, with the options chosen for the site."""
    seen: Moments | None
    """The moments; None for a method that uses no data."""

    @property
    def tokens(self) -> int | None:
        return None if self.seen is None else self.seen.tokens


Work = tuple[Part, Site, SiteTransform | None]
"""A site of a part, and its transform."""


def round_sites(run: BlockRun, works: Sequence[Work]) -> list[dict[str, RoundedLinear]]:
    """`round_site` for sites of several parts, such as experts.

    Their weights have the same shapes and formats, and none reads the output of another. If there are as many sites as
    processes, with linears of the same names, each process rounds one and is given the tokens of all. For small
    matrices this is faster: half of one takes a GPU as long as the whole, and many small sums between processes take
    longer than sending the tokens.
    """
    if not is_one_each([site for _, site, _ in works], run.world):
        return [round_site(run, *work) for work in works]
    alone, part = by_itself(run, [part for part, _, _ in works])
    return exchanged(round_site(alone, part, *works[run.world.rank][1:]), run.world)


def round_site(run: BlockRun, part: Part, site: Site, transform: SiteTransform | None) -> dict[str, RoundedLinear]:
    """Round the linears of a site, by their names, for the inputs of the part. Several processes share the rows."""
    statistics = _statistics(run, part, site, transform)
    weights, method, seen, tokens = statistics.weights, statistics.method, statistics.seen, statistics.tokens
    recipe, scheme = run.of(part, site)
    groups = weights.whole_linears if scheme.weights.looks_at_whole_tensor else weights.groups
    hessian, shift = (None, None) if seen is None else (seen.hessian, seen.shift)
    own = groups if scheme.weights.looks_at_whole_tensor else shares(groups, run.world)
    moves = [] if shift is None else [shift[rows.place] for rows in own]
    prepared = method.prepare(hessian, moves, f"{part.name}.{site.linears[0]}")
    del hessian, seen, statistics  # their results are in `prepared`
    found: dict[str, list[RoundedRows]] = {linear: [] for linear in site.linears}
    for position, rows in enumerate(groups):
        move = moves[position] if moves else None
        for linear, piece in _round_rows(run, part, site, weights, rows, own[position], method, prepared, move):
            found[linear].append(piece)
    strength = method.target_strength if recipe.rounding.chooses_target else None
    return {linear: _together(pieces, prepared.damping, tokens, strength) for linear, pieces in found.items()}


def _round_rows(
    run: BlockRun,
    part: Part,
    site: Site,
    weights: SiteWeights,
    rows: Rows,
    own: Rows,
    method: RoundingMethod,
    prepared: Prepared,
    move: Tensor | None,
) -> list[tuple[str, RoundedRows]]:
    """Round some rows of the named linears. This process rounds its `own` rows among them."""
    recipe, scheme = run.of(part, site)
    folded = weights.folded(own)
    name, quantizer = f"{part.name}.{weights.linears[0]}", scheme.weights
    result = method.round_rows(folded, quantizer.format, quantizer.rule, prepared, name, move)
    rounded = result.weight
    remainder = result.remainder.to(torch.bfloat16) if recipe.keeps_remainders else None
    if own is not rows:
        rounded, folded = gathered(rounded, run.world), weights.folded(rows)
        remainder = None if remainder is None else gathered_rows(remainder, run.world)
    pieces = zip(
        rows.pieces,
        rounded.split_rows(rows.counts),
        folded.split(rows.counts),
        [None for _ in rows.counts] if remainder is None else remainder.split(rows.counts),
        strict=True,
    )
    found = []
    for (linear, _, _), weight, wanted, kept in pieces:
        check_rounded(weight, wanted, f"{part.name}.{linear}")
        found.append((linear, RoundedRows(weight, *error_norms(weight, wanted), kept)))
    return found


def _statistics(run: BlockRun, part: Part, site: Site, transform: SiteTransform | None) -> SiteStatistics:
    """The rounding method of a site and, if rounding needs them, the moments of its inputs with the shift towards its
    target; over all processes."""
    weights = SiteWeights(part.weights, site.linears, transform)
    recipe, scheme = run.of(part, site)
    requirements = recipe.rounding.requirements
    if not requirements.hessian:
        return SiteStatistics(weights, recipe.rounding, None)
    executor = part.executor
    assert executor is not None
    quantizer = scheme.activations if requirements.inputs == "quantized" else None

    def moments(batches: Sequence[int]) -> Moments:
        seen = SiteInputs(executor, site, weights.transform, quantizer, batches)
        if part.original is None or requirements.target == "own":
            return Moments(seen.hessian(weights, requirements), None, executor.tokens_of(batches))
        return Moments(*seen.hessian_and_shift(part.original, weights, requirements), executor.tokens_of(batches))

    method = recipe.rounding
    if requirements.folds == "none":
        found = moments(executor.fitted)
    else:
        groups = {name: own for name, own in executor.groups.items() if executor.tokens_of(own)}
        fitted, folds = folds_of({name: moments(own) for name, own in groups.items()}, requirements)
        by, name = scheme.weights, f"{part.name}.{site.linears[0]}"
        peers = run.world.peers
        spread = None if peers.size == 1 else peers.spread
        method = method.chosen(folds, weights.all_folded(), by.format, by.rule, name, spread)
        del folds  # frees the held-out moments, too
        found = Moments.together(fitted)
        if method.requirements.target == "own":
            found = replace(found, shift=None)
    executor.forget_inputs()
    return SiteStatistics(weights, method, found)


def folds_of(groups: Mapping[str, Moments], requirements: Requirements) -> tuple[list[Moments], list[Fold]]:
    """The moments of everything to fit to, in parts, and the folds for the choice of candidates.

    "windows": all kinds together, with a fold for the held-out windows of each kind. "kinds": each kind, with a fold
    for the held-out windows of each other kind. With one kind both are the same. No folds if nothing is held out. The
    kinds in `groups` may be overwritten.
    """
    kinds = {name: one for name, one in groups.items() if not name.startswith(HELD)}
    held = {name: groups[f"{HELD} {name}"] for name in kinds if f"{HELD} {name}" in groups}
    if requirements.folds == "windows" or len(kinds) == 1:
        fitted = Moments.together(list(kinds.values()))
        return [fitted], [Fold(fitted, one) for one in held.values()]
    folds = [Fold(one, held[other]) for name, one in kinds.items() for other in held if other != name]
    return list(kinds.values()), folds


def _together(
    pieces: Sequence[RoundedRows], damping: float | None, tokens: int | None, strength: float | None
) -> RoundedLinear:
    """The whole linear, from its pieces."""
    remainders = [piece.remainder for piece in pieces if piece.remainder is not None]
    return RoundedLinear(
        QTensor.one_above_other([piece.weight for piece in pieces]),
        error_ratio(_norm([piece.lost for piece in pieces]), _norm([piece.norm for piece in pieces])),
        damping,
        torch.cat(remainders) if remainders else None,
        tokens,
        strength,
    )


def exchanged(own: Mapping[str, RoundedLinear], world: World) -> list[dict[str, RoundedLinear]]:
    """The linears that each process has rounded, by rank; `own` is this process's. Names and shapes are the same in
    all."""
    found = []
    for values in each_of(chain(*(_numbers(linear) for linear in own.values())), world):
        of_one = {}
        for name, linear in own.items():
            codes, parts = next(values), {part: next(values) for part in linear.weight.parts.tensors}
            error, told = next(values), next(values)
            remainder = None if linear.remainder is None else next(values)
            weight = QTensor(codes, linear.weight.parts.with_tensors(parts), linear.weight.format)
            damping, strength, tokens = (None if math.isnan(value) else value for value in told.tolist())
            tokens = None if tokens is None else int(tokens)
            of_one[name] = RoundedLinear(weight, error, damping, remainder, tokens, strength)
        found.append(of_one)
    return found


def _numbers(linear: RoundedLinear) -> list[Tensor]:
    """All tensors of a rounded linear, in the order of `exchanged`; NaN stands for None."""
    told = [math.nan if value is None else value for value in (linear.damping, linear.target_strength, linear.tokens)]
    codes = linear.weight.codes
    found = [codes, *linear.weight.parts.tensors.values(), linear.error]
    found.append(torch.tensor(told, dtype=torch.float64, device=codes.device))
    return found if linear.remainder is None else [*found, linear.remainder]


def error_norms(weight: QTensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The Frobenius norms of the error of `weight` [n, K] against `wanted`, and of `wanted`; some rows at a time."""
    if wanted.numel() <= ERROR_ELEMENTS:
        return (weight.dequantize(torch.float64) - wanted).norm(), wanted.norm()
    counts = [len(rows) for rows in wanted.split(max(1, ERROR_ELEMENTS // wanted.shape[1]))]
    pieces = list(zip(weight.split_rows(counts), wanted.split(counts), strict=True))
    lost = [(rows.dequantize(torch.float64) - expected).norm() for rows, expected in pieces]
    return _norm(lost), _norm([expected.norm() for _, expected in pieces])


def _norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of a matrix, from those of groups of rows."""
    return norms[0] if len(norms) == 1 else torch.stack(list(norms)).norm()


def error_ratio(lost: Tensor, norm: Tensor) -> Tensor:
    """A relative error, a scalar; the absolute error if the norm is zero."""
    return torch.where(norm > 0, lost / norm, lost)
