"""The specification of each kernel, in plain PyTorch."""

from mxrot.kernels.plain.activations import (
    E5M2_EXPONENTS,
    PackedRows,
    in_pairs,
    out_of_pairs,
    plain_rotate_quantize,
    plain_rotate_quantize_e5m2,
    plain_rotate_quantize_packed,
    swizzle_scales,
    swizzled_bytes,
)
from mxrot.kernels.plain.cached_attention import (
    CachedTokens,
    CacheMatrices,
    TokenRows,
    plain_append_tokens,
    plain_decode_attention,
)
from mxrot.kernels.plain.exact_tokens import ExactTokens
from mxrot.kernels.plain.look_up import (
    IntegerRows,
    in_planes,
    looked_up,
    out_of_planes,
    plain_look_up_product,
    plain_quantize_rows,
)
from mxrot.kernels.plain.moments import (
    count_parts,
    diagonal_blocks,
    moment_of_parts,
    plain_bfloat16_parts,
)
from mxrot.kernels.plain.products import (
    E4M3_SHIFTS,
    lift_exponents,
    lift_rows,
    plain_fp8_product,
    plain_lift_weights,
    plain_packed_product,
    plain_paired_product,
)
from mxrot.kernels.plain.rounding import (
    ReachedColumns,
    RoundedColumns,
    plain_round_columns,
    plain_round_on_grid,
    plain_round_reached,
)
from mxrot.kernels.plain.tuning import (
    WeightGradients,
    WeightMoves,
    plain_divergence,
    plain_moved_weights,
    plain_moved_weights_gradients,
)

__all__ = [
    "E4M3_SHIFTS",
    "E5M2_EXPONENTS",
    "CacheMatrices",
    "CachedTokens",
    "ExactTokens",
    "IntegerRows",
    "PackedRows",
    "ReachedColumns",
    "RoundedColumns",
    "TokenRows",
    "WeightGradients",
    "WeightMoves",
    "count_parts",
    "diagonal_blocks",
    "in_pairs",
    "in_planes",
    "lift_exponents",
    "lift_rows",
    "looked_up",
    "moment_of_parts",
    "out_of_pairs",
    "out_of_planes",
    "plain_append_tokens",
    "plain_bfloat16_parts",
    "plain_decode_attention",
    "plain_divergence",
    "plain_fp8_product",
    "plain_lift_weights",
    "plain_look_up_product",
    "plain_moved_weights",
    "plain_moved_weights_gradients",
    "plain_packed_product",
    "plain_paired_product",
    "plain_quantize_rows",
    "plain_rotate_quantize",
    "plain_rotate_quantize_e5m2",
    "plain_rotate_quantize_packed",
    "plain_round_columns",
    "plain_round_on_grid",
    "plain_round_reached",
    "swizzle_scales",
    "swizzled_bytes",
]
