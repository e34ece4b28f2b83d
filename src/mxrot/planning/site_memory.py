"""The memory of one site: passes over its inputs, statistics, the fit of its transform, rounding."""

from __future__ import annotations

import math

from mxrot.calibration import site_weights
from mxrot.formats.block import ENCODED_ELEMENTS
from mxrot.kernels.chunked import CHUNK_ELEMENTS
from mxrot.kernels.plain.moments import LEAST_CHUNK, MOST_PARTIAL
from mxrot.planning.choosing import DECODING, ENCODING, WALKING, chooses, choosing_terms, moment_bytes
from mxrot.planning.refitting import is_refitted, refitting_terms, waiting_terms
from mxrot.planning.run import Run, fit_size, keeps_share, reads_residual
from mxrot.planning.shape import SiteShape
from mxrot.planning.stage import CODED_BYTES, Pieces, Stage
from mxrot.rounding.linalg import COPIED_ELEMENTS

WIDE_TRANSFORM = 8.0
"""The float64 size of a transform and its inverse, relative to the bfloat16 size that is stored."""


def forward_bytes(run: Run, position: int) -> float:
    """The peak bytes of a pass of one batch up to site `position`."""
    sites, here = run.shape.fullest, run.shape.fullest[position]
    b, s = run.batch_tokens, run.itemsize
    before = [site for site in sites[:position] if site.child == here.child]
    made = sum(site.share * site.rounded for site in before)
    quantizing = _quantizing(run, max((site.inputs for site in before), default=0))
    quantizing += max((_transforming(run, site) for site in before), default=0.0)
    # A norm computes in float32; a product of quantized inputs is float32 before it is `s` bytes wide.
    norm = b * run.shape.hidden * (s + 8.0)
    is_attention = run.shape.fullest[0].child == here.child
    # Scores, and then probabilities in float32.
    scores = b * run.token_scores * (s + 4.0) if is_attention and before else 0.0
    return max(norm, quantizing + b * made * (5.0 * s if is_attention else (4.0 if run.is_gpu else 6.0)) + scores)


def _quantizing(run: Run, channels: int) -> float:
    """The bytes for quantizing inputs: piece by piece on a CPU, by one kernel on a GPU."""
    return 0.0 if run.is_gpu else 14.0 * min(run.batch_tokens * channels, CHUNK_ELEMENTS)


def _transforming(run: Run, here: SiteShape) -> float:
    """The bytes of inputs between stages without a kernel: float32 before and after a stage, and the outputs of all but
    the last."""
    if here.is_fused:
        return 0.0
    led = run.itemsize if len(here.scheme.stages) > 1 else 0
    return (8.0 + led) * run.batch_tokens * here.inputs


def _moment(run: Run, b: int, n: int, m: int, is_scaled: bool) -> float:
    """The bytes of a second moment [n, m] of a batch of `b` tokens: parts of its operands, products, and their sums."""
    if not run.is_gpu:
        return 12.0 * n * m + (4.0 * b * n if is_scaled else 0.0)
    wide = 2 * n if is_scaled else n
    count = 1
    while b // (2 * count) >= LEAST_CHUNK and 2 * count * wide * m <= MOST_PARTIAL:
        count *= 2
    return (2.0 * b * wide if is_scaled else 0.0) + max(4.0 * count * wide * m + 4.0 * n * m, 12.0 * n * m)


def site_stages(run: Run, position: int, base: dict[str, float]) -> list[Stage]:
    """The stages of one site. `base` holds the tensors that are alive in all of them."""
    here = run.shape.fullest[position]
    recipe = here.recipe
    name = here.site.name
    stages = []
    if run.tokens:
        stages.append(Stage(f"{name}: collecting", base | {"one batch": forward_bytes(run, position)}))
    if here.scheme.stages:
        count, of_fit = here.weights / here.transforms, here.transform.fitting_bytes(fit_size(run, here))
        is_wide = count <= site_weights.MOST_TOGETHER or recipe.smoothing is not None
        weights = count * (8.0 if is_wide else run.stored.itemsize)
        smoothed = weights if recipe.smoothing is not None else 0.0  # in addition to the weights before smoothing
        stages.append(Stage(f"{name}: fitting", base | {"fitting the transform": weights + max(smoothed, of_fit)}))
        base = base | {"the transform and its inverse": WIDE_TRANSFORM * here.scheme.transform_bytes(here.inputs)}
    if here.transforms < here.experts:
        base = base | {
            "rounded weights of the other experts": CODED_BYTES * (here.weights - here.rounded * here.inputs)
        }
    if recipe.rounding.requirements.hessian:
        stages += [Stage(f"{name}: statistics", base | _moments(run, position))]
        if chooses(run, here):
            stages.append(Stage(f"{name}: choosing", base | choosing_terms(run, here)))
        stages.append(Stage(f"{name}: factorizing", base | _factorizing(here)))
    stages.append(Stage(f"{name}: rounding", base | _rounding(here)))
    if is_refitted(here):
        base = base | waiting_terms(run, here)
        stages.append(Stage(f"{name}: statistics for a refit", base | _statistics(run, position, run.fitted_tokens)))
        stages.append(Stage(f"{name}: refit", base | refitting_terms(here)))
    return stages


def _factorizing(here: SiteShape) -> dict[str, float]:
    """The Hessian, with two more matrices of its size, or with one that replaces it (rounding/linalg.py)."""
    h, pieces = 8.0 * here.inputs**2, Pieces.of(here)
    reversing = 8.0 * min(here.inputs**2, COPIED_ELEMENTS)
    if not here.follows_original:
        return {"the Hessian and its factor": 2 * h + reversing}
    # The regression leaves its factor. Groups of rows are moved towards the target with it.
    moved = 2 * pieces.together
    return {
        "the Hessian and its factor": max(3 * h + reversing, 2 * h + moved),
        "weights while they are rounded": pieces.whole + pieces.folded,
    }


def _rounding(here: SiteShape) -> dict[str, float]:
    """The weights, their rounded values and rounding errors, and the numbers for encoding."""
    pieces, count = Pieces.of(here), here.rounded * here.inputs
    u, shift = pieces.together, pieces.whole if here.follows_original else 0.0
    encoding = 8.0 * ENCODING * min(u / 8, ENCODED_ELEMENTS)
    coded = CODED_BYTES * (count - u / 8)  # the other rows
    kept = shift + u + coded  # the folded weights of some rows
    if not here.recipe.rounding.requirements.hessian:
        return {"weights while they are rounded": kept + max(encoding, DECODING * u)}
    walked = u if here.follows_original else 0.0  # moved towards the target
    walked += max(WALKING * u, 2 * u + encoding)
    return {"the factor of the Hessian": 8.0 * here.inputs**2, "weights while they are rounded": kept + walked}


def _moments(run: Run, position: int) -> dict[str, float]:
    """The Hessian of a site and the shift towards its target. If options are chosen, those of each group of windows in
    turn, at the peak."""
    here = run.shape.fullest[position]
    if not chooses(run, here):
        return _statistics(run, position, run.fitted_tokens)
    found = []
    for before, tokens in enumerate(run.groups.values()):
        own, kept = _statistics(run, position, tokens, before > 0), before * moment_bytes(here)
        found.append(own | ({"moments of kinds of text": kept} if kept else {}))
    return max(found, key=lambda terms: sum(terms.values()))


def _statistics(run: Run, position: int, tokens: int, is_folded: bool = False) -> dict[str, float]:
    """The Hessian of a site and the shift towards its target, on this number of tokens. With `is_folded` the weights
    are folded before.

    The data of a batch stay alive while the next one passes through the block. If inputs were kept, there is no such
    pass.
    """
    here = run.shape.fullest[position]
    requirements = here.recipe.rounding.requirements
    n, k, batch = here.rounded, here.inputs, run.batch_of(tokens)
    b = math.ceil(here.share * batch)
    pieces, h = Pieces.of(here), 8.0 * k * k
    u = pieces.whole
    is_residual = reads_residual(run, here)
    is_wide = requirements.inputs == "unquantized"
    is_scaled = requirements.relative and here.site.residual is not None
    temporary = _moment(run, batch, k, k, is_scaled or (run.is_gpu and is_wide))
    left = b * k * (2.0 if run.is_gpu and not is_wide else 4.0)  # inputs of the site: transformed and quantized
    weights = (2.0 if run.is_gpu else 4.0) * n * k if is_residual else 0.0  # for its outputs
    folded = pieces.folded if is_folded and here.follows_original else 0.0
    # Some rows of the folded weights, and their own output in the shift; folding takes as much.
    own = pieces.folded + (1 if pieces.folded else 2) * pieces.together
    if not here.follows_original:
        left += 4.0 * b * n if is_residual else 0.0
        totals, ending = h, 2 * h
    else:
        left += b * k * run.itemsize
        if is_residual:
            left += 12.0 * b * n  # the target output, the stream with it, and its error
            temporary = max(temporary, _moment(run, batch, n, k, True) + (0.0 if run.is_gpu else 4.0 * b * k))
            totals, ending = h + u, max(2 * h + u + folded, h + 2 * u + folded, h + u + own)
        else:
            totals = 2 * h
            ending = max(3 * h + folded, 2 * h + u + max(own, pieces.folded + pieces.together))
    runs_again = here.follows_original or keeps_share(run, here) < 1
    others = here.share * tokens - b
    forward = forward_bytes(run, position) * min(1.0, others / b) if runs_again else 0.0
    during = left + max(temporary, forward, _quantizing(run, k) + _transforming(run, here)) + folded
    is_at_end = left + ending > during + totals
    return {
        "one batch": left if is_at_end else during,
        "sums over all batches": ending if is_at_end else totals,
        "weights for the outputs": weights,
    }
