"""Inputs that decide how an element rounds: every value, every midpoint, and what lies around them."""

import math

import torch
from torch import Tensor

from mxrot.formats import Element


def rounding_grid(element: Element, dtype: torch.dtype) -> Tensor:
    """Values, midpoints, their neighbours in `dtype`, points between, numbers out of range; both signs."""
    magnitudes = sorted({abs(v) for v in element.values if math.isfinite(v)})
    low = torch.tensor(magnitudes, dtype=dtype)
    high = torch.tensor([*magnitudes[1:], 2 * magnitudes[-1] - magnitudes[-2]], dtype=dtype)
    between = low[:, None] + (high - low)[:, None] * torch.arange(17, dtype=dtype) / 16
    marks = torch.cat([low, (low + high) / 2])
    up, down = (torch.nextafter(marks, torch.full_like(marks, end)) for end in (math.inf, -math.inf))
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max / 2
    extremes = torch.tensor([0.0, tiny, tiny / 8, 2 * element.max, 1e30, huge], dtype=dtype)
    grid = torch.cat([between.flatten(), marks, up, down, extremes]).abs()
    return torch.cat([grid, -grid])
