"""Fast code for what the plain path defines, and the choice between them."""

from mxrot.kernels.dispatch import multiply, rotate_quantize, round_columns
from mxrot.kernels.plain import RoundedColumns, plain_rotate_quantize, plain_round_columns

__all__ = [
    "RoundedColumns",
    "multiply",
    "plain_rotate_quantize",
    "plain_round_columns",
    "rotate_quantize",
    "round_columns",
]
