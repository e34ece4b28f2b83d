"""A kernel that does nothing: what launching one takes (Triton)."""

from __future__ import annotations

import triton
from torch import Tensor


@triton.jit
def _nothing(pointer):
    pass


def nothing(x: Tensor) -> None:
    """Launch one program of one warp on the device of `x`."""
    _nothing[(1,)](x, num_warps=1)
