"""Fast code for what the plain path defines, and the choice between them."""

from mxrot.kernels.dispatch import (
    divergence,
    moved_weights,
    moved_weights_gradients,
    multiply,
    rotate_quantize,
    round_columns,
)
from mxrot.kernels.plain import (
    RoundedColumns,
    WeightGradients,
    WeightMoves,
    plain_divergence,
    plain_moved_weights,
    plain_moved_weights_gradients,
    plain_rotate_quantize,
    plain_round_columns,
)

__all__ = [
    "RoundedColumns",
    "WeightGradients",
    "WeightMoves",
    "divergence",
    "moved_weights",
    "moved_weights_gradients",
    "multiply",
    "plain_divergence",
    "plain_moved_weights",
    "plain_moved_weights_gradients",
    "plain_rotate_quantize",
    "plain_round_columns",
    "rotate_quantize",
    "round_columns",
]
