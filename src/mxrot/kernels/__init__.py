"""Fast code for what the plain path defines, and the choice between them."""

from mxrot.kernels.dispatch import multiply, rotate_quantize
from mxrot.kernels.plain import plain_rotate_quantize

__all__ = ["multiply", "plain_rotate_quantize", "rotate_quantize"]
