"""The memory and the work of training rotations. They follow tuning/rotated_network.py."""

from __future__ import annotations

from mxrot.planning.run import Run
from mxrot.planning.shape import SiteShape
from mxrot.planning.stage import Stage
from mxrot.tuning.network import LOGIT_TOKENS
from mxrot.tuning.rotated_network import CHANNEL_BYTES, ROOM, WEIGHT_BYTES, Pieces

ROTATION_COPIES = 4
"""The float64 matrices per rotation: the rotation, its parameter, its gradient, and the result of a step."""


def trained_bytes(run: Run, sites: tuple[SiteShape, ...]) -> float:
    """The bytes that a backward pass keeps per token and block."""
    widths = sum(site.share * (rows + site.inputs) for site in sites for rows in site.rows)
    return CHANNEL_BYTES * widths + 8.0 * run.token_scores


def training_pieces(run: Run) -> Pieces:
    """The pieces that training computes at once."""
    rotation, shape = run.recipe.rotation, run.shape
    assert rotation is not None
    batch = max(1, min(rotation.batch_windows, run.windows))
    weights = WEIGHT_BYTES * shape.linear_weights / len(shape.blocks)
    window, states = run.seq_len * trained_bytes(run, shape.fullest), 4.0 * run.seq_len * shape.hidden
    room = ROOM["cuda" if run.is_gpu else "cpu"]
    return Pieces.within(room, batch, len(shape.blocks), weights, window, states)


def training_stages(run: Run) -> list[Stage]:
    """The stages of memory. Empty if rotations are not trained."""
    if not run.recipe.trains_rotations:
        return []
    shape, pieces = run.shape, training_pieces(run)
    tokens, blocks = pieces.windows * run.seq_len, 1 if pieces.recompute else len(shape.blocks)
    kept = 4.0 * tokens * shape.hidden * len(shape.blocks) if pieces.recompute else 0.0
    terms = {
        "the original model": run.model_bytes,
        "rotations": float(ROTATION_COPIES * run.rotation_bytes),
        "rotated weights": blocks * WEIGHT_BYTES * shape.linear_weights / len(shape.blocks),
        "activations": kept + blocks * tokens * trained_bytes(run, shape.fullest) + 8.0 * tokens * shape.hidden,
        "logits": 12.0 * min(tokens, LOGIT_TOKENS) * shape.vocabulary,
    }
    return [Stage("training rotations", terms)]
