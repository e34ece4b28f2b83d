"""How far the maximum of a block is shrunk before its scale is stored: the search of MR-GPTQ (arXiv 2509.23202).

Each shrink p of SHRINKS makes the scale p * amax / max, which no type has rounded yet, and the block is rounded under
it; kept is the p with the least sum of |error|^POWER. How much of that the stored scale keeps is up to the rule that
casts it: a power of two knows nothing between two octaves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.formats.element import Element

SHRINKS = 100
"""p = 1 - i / SHRINKS, for i from 0 on."""
POWER = 2.4
SEARCHED_ELEMENTS = 1 << 20
"""Of blocks that are searched at once: all shrinks one after the other, so a few numbers for each element."""


def shrunk_maxima(blocks: Tensor, maxima: Tensor, element: Element) -> Tensor:
    """`maxima` [...] of float32/float64 `blocks` [..., B], each times its best shrink; of equals the largest.

    Errors are computed in float32, relative to the maximum. NaN and Inf stay what they are, and so does 0.
    """
    flat, largest = blocks.reshape(-1, blocks.shape[-1]), maxima.reshape(-1)
    count = max(1, SEARCHED_ELEMENTS // max(1, flat.shape[-1]))
    pieces = zip(flat.split(count), largest.split(count), strict=True)
    found = [_best_shrinks(piece, own, element) for piece, own in pieces]
    return maxima * torch.cat(found).view(maxima.shape) if found else maxima


def _best_shrinks(blocks: Tensor, maxima: Tensor, element: Element) -> Tensor:
    """In the type of `maxima` [M], for blocks [M, B]."""
    relative = (blocks / torch.where(maxima > 0, maxima, 1.0)[:, None]).float()
    best = torch.ones_like(maxima)
    least = torch.full_like(maxima, torch.inf, dtype=torch.float32)
    for index in range(SHRINKS):
        shrink = 1 - index / SHRINKS
        scale = shrink / element.max
        error = element.round(relative / scale).mul_(scale).sub_(relative).abs_().pow_(POWER).sum(dim=-1)
        better = error < least
        best = torch.where(better, shrink, best)
        least = torch.where(better, error, least)
    return best
