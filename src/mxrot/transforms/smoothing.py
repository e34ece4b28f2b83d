"""SmoothQuant's per-channel scales (arXiv 2211.10438, section 4), as DuQuant++ uses them.

s_j = amax_x(j)^alpha / amax_w(j)^(1 - alpha). The input becomes x_j / s_j and the weights W_j * s_j. With root mean
squares instead of maxima and alpha 1/2, both get the same second moment in every channel. By the Cauchy-Schwarz
inequality, this minimizes E|x D^-1|^2 |W D|^2 over all diagonal matrices D.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SmoothingBy = Literal["maxima", "moments"]
"""How channels of inputs and weights are compared: by max |x|, as in SmoothQuant, or by the root of E[x^2]."""

SMALLEST = 1e-5
"""The lower limit of maxima and root mean squares, so that a dead channel does not get an extreme scale."""


def smoothing_scales(input_maxima: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s, float64 [K], from max |x| over the calibration tokens [K] and all weights of the site [rows, K]."""
    return _balance(input_maxima.double(), weights.double().abs().amax(dim=0), alpha)


def moment_scales(input_squares: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s, float64 [K], like `smoothing_scales`, from E[x^2] over the calibration tokens [K] and the mean square of the
    site's weights [rows, K]."""
    return _balance(input_squares.double().sqrt(), weights.double().square().mean(dim=0).sqrt(), alpha)


def _balance(of_inputs: Tensor, of_weights: Tensor, alpha: float) -> Tensor:
    scales = of_inputs.clamp(min=SMALLEST) ** alpha / of_weights.clamp(min=SMALLEST) ** (1 - alpha)
    return scales.clamp(min=SMALLEST)


def equal_over_groups(scales: Tensor, value_heads: int, head_dim: int, by: SmoothingBy = "maxima") -> Tensor:
    """Scales [heads * head_dim] made equal over the query heads that read one value head: by their maximum, or for
    "moments" by their geometric mean.

    Query head h reads value head h // (heads / value_heads), so the channels of a group are adjacent.
    """
    grouped = scales.view(value_heads, -1, head_dim)
    one = grouped.amax(dim=1, keepdim=True) if by == "maxima" else grouped.log().mean(dim=1, keepdim=True).exp()
    return one.expand_as(grouped).flatten().contiguous()


def per_value_row(scales: Tensor, value_heads: int, head_dim: int) -> Tensor:
    """The scales of `equal_over_groups`, one for each row of v_proj: [value_heads * head_dim]."""
    return torch.clone(scales.view(value_heads, -1, head_dim)[:, 0]).flatten()
