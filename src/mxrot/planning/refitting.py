"""The memory and the work of refitting transforms behind codes. They follow quantizing/refit.py."""

from __future__ import annotations

from mxrot.planning.choosing import DECODING
from mxrot.planning.run import Run
from mxrot.planning.shape import SiteShape
from mxrot.planning.stage import CODED_BYTES, Pieces
from mxrot.quantizing.site import ERROR_ROWS
from mxrot.transforms import BlockDiagonalSpec
from mxrot.transforms.refit import ROUNDS

SOLVING = 5
"""The float64 matrices [K, K] of conjugate gradients: two moments, the target, and two of a step."""
VECTORS = 6
"""The additional float64 numbers per number of the transform."""


def is_refitted(here: SiteShape) -> bool:
    """True if the matrices of the site are refitted."""
    multiplied = any(isinstance(stage, BlockDiagonalSpec) for stage in here.scheme.stages)
    return here.recipe.refit is not None and multiplied and not here.site.is_of_experts


def waiting_terms(run: Run, here: SiteShape) -> dict[str, float]:
    """Codes that are not installed yet, and inputs to measure their error: a view of the first batch on a CPU."""
    tokens = min(ERROR_ROWS, run.batch_tokens) if run.is_gpu else run.batch_tokens
    return {"rounded weights": CODED_BYTES * here.weights, "sampled inputs": 4.0 * tokens * here.inputs}


def refitting_terms(here: SiteShape) -> dict[str, float]:
    """The memory once the moments are there: products of groups of rows in turn, then the solver."""
    pieces, h = Pieces.of(here), 8.0 * here.inputs**2
    u, shift = pieces.together, pieces.whole if here.follows_original else 0.0
    split = len(here.rows) > 1 and pieces.whole == u
    decoded = u + max(DECODING * 8.0 * max(here.rows) * here.inputs if split else (DECODING - 1) * u, u if split else 0)
    folded = pieces.folded if pieces.folded else u
    product = max(h, u) + u + u  # codes, and the error of the outputs
    rows = max(decoded, folded + product)
    solver = SOLVING * h + 8.0 * VECTORS * here.inputs * here.recipe.transform.block
    return {"refitting the transform": max(3 * h + shift + max(rows, h + pieces.folded), solver)}


def refitting_work(run: Run, here: SiteShape) -> dict[str, float]:
    """The amounts of work, by the name of their rate, without a pass and its statistics."""
    if not is_refitted(here):
        return {}
    n, k, block = here.rounded, here.inputs, here.recipe.transform.block
    return {
        "float64": 6.0 * n * k * k + 4.0 * ROUNDS * block * k * k,
        "copy": 56.0 * ROUNDS * k * k + 40.0 * n * k,
        "operations": 20.0 * ROUNDS,
    }
