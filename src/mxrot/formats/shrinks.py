"""The factor that shrinks the maximum of a block before its scale is stored: MR-GPTQ's search (arXiv 2509.23202).

Each factor p gives the unrounded scale p * amax / max, and the block is rounded under it. The p with the least sum of
|error|^POWER is kept. The rule then casts the scale to its type, which may lose part of this choice: a power of two has
no steps within an octave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.formats.element import Element

SHRINKS = 100
"""The factors p are 1 - i / SHRINKS, for i from 0 on."""
POWER = 2.4
SEARCHED_ELEMENTS = 1 << 20
"""The number of elements searched at once. The factors are tried in turn, so each element takes little memory."""


def shrunk_maxima(blocks: Tensor, maxima: Tensor, element: Element) -> Tensor:
    """`maxima` [...] of float32/float64 `blocks` [..., B], each times its best factor; the largest factor in a tie.

    Errors are computed in float32, relative to the maximum. NaN, Inf and 0 stay as they are.
    """
    flat, largest = blocks.reshape(-1, blocks.shape[-1]), maxima.reshape(-1)
    count = max(1, SEARCHED_ELEMENTS // max(1, flat.shape[-1]))
    pieces = zip(flat.split(count), largest.split(count), strict=True)
    found = [_best_shrinks(piece, own, element) for piece, own in pieces]
    return maxima * torch.cat(found).view(maxima.shape) if found else maxima


def _best_shrinks(blocks: Tensor, maxima: Tensor, element: Element) -> Tensor:
    """Best factor of each block [M, B], in the type of `maxima` [M]."""
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
