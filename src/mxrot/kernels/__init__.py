"""Fast code for what the plain path defines, and the choice between them."""

from mxrot.kernels.dispatch import (
    Choice,
    block_moments,
    choose_path,
    divergence,
    moved_weights,
    moved_weights_gradients,
    multiply,
    outputs,
    quantized_linear,
    rotate_quantize,
    round_columns,
    second_moment,
    weight_parts,
)
from mxrot.kernels.linear import Inputs, PackedWeight
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
    "Choice",
    "Inputs",
    "PackedWeight",
    "RoundedColumns",
    "WeightGradients",
    "WeightMoves",
    "block_moments",
    "choose_path",
    "divergence",
    "moved_weights",
    "moved_weights_gradients",
    "multiply",
    "outputs",
    "plain_divergence",
    "plain_moved_weights",
    "plain_moved_weights_gradients",
    "plain_rotate_quantize",
    "plain_round_columns",
    "quantized_linear",
    "rotate_quantize",
    "round_columns",
    "second_moment",
    "weight_parts",
]
