"""What refitting transforms behind codes takes: memory, and work; quantizing/refit.py has what it follows."""

from __future__ import annotations

from mxrot.planning.choosing import DECODING
from mxrot.planning.run import Run
from mxrot.planning.shape import SiteShape
from mxrot.planning.stage import CODED_BYTES, Pieces
from mxrot.quantizing.site import ERROR_ROWS
from mxrot.transforms import BlockDiagonalSpec
from mxrot.transforms.refit import ROUNDS

SOLVING = 5
"""Matrices [K, K] in float64 while conjugate gradients go on: two moments, what is wanted, and two of a step."""
VECTORS = 6
"""Numbers in float64 for each of the transform's, besides."""


def is_refitted(here: SiteShape) -> bool:
    """Are its matrices fitted once more?"""
    multiplied = any(isinstance(stage, BlockDiagonalSpec) for stage in here.scheme.stages)
    return here.recipe.refit is not None and multiplied and not here.site.is_of_experts


def waiting_terms(run: Run, here: SiteShape) -> dict[str, float]:
    """Codes that wait to be put in place, and inputs to measure their error by: a view of the first batch on a CPU."""
    tokens = min(ERROR_ROWS, run.batch_tokens) if run.is_gpu else run.batch_tokens
    return {"rounded weights": CODED_BYTES * here.weights, "sampled inputs": 4.0 * tokens * here.inputs}


def refitting_terms(here: SiteShape) -> dict[str, float]:
    """Of memory, once the moments are there: products with some rows after the others, then the solver."""
    pieces, h = Pieces.of(here), 8.0 * here.inputs**2
    u, shift = pieces.together, pieces.whole if here.follows_original else 0.0
    split = len(here.rows) > 1 and pieces.whole == u
    decoded = u + max(DECODING * 8.0 * max(here.rows) * here.inputs if split else (DECODING - 1) * u, u if split else 0)
    folded = pieces.folded if pieces.folded else u
    product = max(h, u) + u + u  # codes, and what the outputs lack
    rows = max(decoded, folded + product)
    solver = SOLVING * h + 8.0 * VECTORS * here.inputs * here.recipe.transform.block
    return {"refitting the transform": max(3 * h + shift + max(rows, h + pieces.folded), solver)}


def refitting_work(run: Run, here: SiteShape) -> dict[str, float]:
    """Amounts by the name of the rate that they are done at, besides a pass and its statistics."""
    if not is_refitted(here):
        return {}
    n, k, block = here.rounded, here.inputs, here.recipe.transform.block
    return {
        "float64": 6.0 * n * k * k + 4.0 * ROUNDS * block * k * k,
        "copy": 56.0 * ROUNDS * k * k + 40.0 * n * k,
        "operations": 20.0 * ROUNDS,
    }
