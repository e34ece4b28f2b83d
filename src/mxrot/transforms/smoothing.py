"""SmoothQuant's per-channel scales (arXiv 2211.10438, section 4), as DuQuant++ uses them.

s_j = amax_x(j)^alpha / amax_w(j)^(1 - alpha); the input becomes x_j / s_j and the weights W_j * s_j.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-5
"""Maxima below this count as this, so that a dead channel does not get an extreme scale."""


def smoothing_scales(input_maxima: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s, float64 [K], from max |x| over the calibration tokens [K] and all weights of the site [rows, K]."""
    of_inputs = input_maxima.double().clamp(min=SMALLEST)
    of_weights = weights.double().abs().amax(dim=0).clamp(min=SMALLEST)
    return (of_inputs**alpha / of_weights ** (1 - alpha)).clamp(min=SMALLEST)


def equal_over_groups(scales: Tensor, value_heads: int, head_dim: int) -> Tensor:
    """Scales [heads * head_dim] made equal over the query heads that read one value head, by their maximum.

    Query head h reads value head h // (heads / value_heads), so channels of one group lie together.
    """
    grouped = scales.view(value_heads, -1, head_dim)
    return grouped.amax(dim=1, keepdim=True).expand_as(grouped).flatten().contiguous()


def per_value_row(scales: Tensor, value_heads: int, head_dim: int) -> Tensor:
    """The scales that `equal_over_groups` made, one for each row of v_proj: [value_heads * head_dim]."""
    return torch.clone(scales.view(value_heads, -1, head_dim)[:, 0]).flatten()
