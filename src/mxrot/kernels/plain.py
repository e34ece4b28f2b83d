"""The specification of each kernel, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.formats import Format, ScaleRule, fake_quantize
from mxrot.transforms.base import apply_matrices


def plain_rotate_quantize(x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule) -> Tensor:
    """Q(x T) in float32, the shape of `x` [..., K]; `matrices` float32 [1 | G, B, B], or None for no transform."""
    transformed = x.to(torch.float32)
    if matrices is not None:
        transformed = apply_matrices(transformed, matrices)
    return fake_quantize(transformed, format, rule)
