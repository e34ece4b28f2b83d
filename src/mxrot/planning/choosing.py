"""The memory and the work of choices by site. They follow quantizing/rounded.py and rounding/held_out.py."""

from __future__ import annotations

from mxrot.formats.block import ENCODED_ELEMENTS
from mxrot.planning.run import Run
from mxrot.planning.shape import SiteShape
from mxrot.planning.stage import Pieces
from mxrot.rounding.held_out import SAMPLED_ROWS
from mxrot.rounding.linalg import COPIED_ELEMENTS

ENCODING = 7
"""The float64 and int64 numbers per weight while it is encoded (formats/element.py)."""
DECODING = 3
"""The same while a code is decoded to a float64 number."""
WALKING = 3
"""The float64 numbers per weight in GPTQ's walk: the columns, their rounded values, and their rounding errors."""


def chooses(run: Run, here: SiteShape) -> bool:
    """True if the site tries options on held-out windows."""
    return here.recipe.rounding.requirements.folds != "none" and len(run.groups) > run.kinds


def moment_bytes(here: SiteShape) -> float:
    """The bytes of the moments of one group of windows: the Hessian, and the shift if there is a target."""
    shift = 8.0 * here.rounded * here.inputs if here.follows_original else 0.0
    return 8.0 * here.inputs**2 + shift


def choosing_terms(run: Run, here: SiteShape) -> dict[str, float]:
    """The memory while options are tried: the moments of all groups, and the results of an option for the weights."""
    rounding, pieces, h = here.recipe.rounding, Pieces.of(here), 8.0 * here.inputs**2
    rows = 8.0 * min(SAMPLED_ROWS, here.rounded) * here.inputs
    reversing = 8.0 * min(here.inputs**2, COPIED_ELEMENTS)
    together = rounding.requirements.folds == "windows"
    kept = len(run.groups) - (run.kinds - 1 if together else 0)
    tried = 0.0
    if rounding.tried_targets:
        # The factor and its original matrix; or the factor, and the regression with one product before.
        tried = max(2 * h + reversing, h + 2 * pieces.whole)
    if rounding.tried_dampings:
        encoding = 8.0 * ENCODING * min(rows / 8, ENCODED_ELEMENTS)
        walking = max(WALKING * rows, 2 * rows + encoding)
        tried = max(tried, rows + 2 * h + max(reversing, walking))
    return {
        "moments of kinds of text": kept * moment_bytes(here),
        "weights while they are rounded": pieces.whole,
        "options that are tried": max(tried, pieces.together * (pieces.whole > pieces.together)),
    }


def choosing_work(run: Run, here: SiteShape) -> dict[str, float]:
    """The amounts of work, by the name of their rate."""
    if not chooses(run, here):
        return {}
    rounding, folds, n, k = here.recipe.rounding, run.kinds, here.rounded, here.inputs
    targets, dampings, rows = rounding.tried_targets, rounding.tried_dampings, min(SAMPLED_ROWS, here.rounded)
    steps = k // (here.recipe.weights.quantizer().format.block or k)
    tried = folds * (targets + dampings)
    products = 2.0 * n * (1 + 3 * targets) * (targets > 0) + rows * (2.0 + 3.0 * dampings) * (dampings > 0)
    return {
        "factor": float(tried * k**3),
        "columns": float(tried * k),
        "float64": folds * products * k * k,
        "rounded": float(folds * dampings * rows * k * rounding.candidates),
        "block_steps": float(folds * dampings * steps),
        "encoded": 1.6 * folds * dampings * rows * k,
        "copy": 16.0 * k * k * (tried + run.kinds),
        "operations": 30.0 * tried + 6.0 * folds * dampings * steps,
    }
