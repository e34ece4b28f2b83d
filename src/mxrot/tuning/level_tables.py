"""The learned partition of two-bit blocks: the clip, the three boundaries and the four values of each block.

RCP (arXiv 2502.15779) learns a non-uniform partition of the two-bit grid together with the clip. Its text and code were
not available; this is our derivation. For a block with smallest element min and largest max, both taken once,

    low = s(lower) min      high = s(upper) max                           s the sigmoid
    t1 = s(a1)     t2 = t1 + (1 - t1) s(a2)     t3 = t2 + (1 - t2) s(a3)  the boundaries, from 0 at low to 1 at high
    c1 = s(b1)     c2 = c1 + (1 - c1) s(b2)                               the inner levels; the outer ones are 0 and 1

so boundaries and levels stay in order whatever is learned. All seven numbers of a block start at the levels of the
earlier rounding, with boundaries halfway between them. At equally spaced levels s(a) is 1/6, 2/5, 2/3 and s(b) 1/3,
1/2, which is clipped asymmetric INT2. In every forward pass, levels go through their stored types, and the gradient
passes unchanged. (If 0 does not lie between the two inner levels of a block, its ends are taken from the nearer of
these instead, so that a block of one sign can also be clipped.)

The numbers of all blocks of a network lie in one tensor each, so a few operations compute those of all weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mxrot.formats.look_up_table import LEVELS, level_values, spaced_levels, stored_levels
from mxrot.formats.parts import NamedParts
from mxrot.sections import Tuning
from mxrot.tuning.loop import Group
from mxrot.tuning.straight_through import PassThrough

ROOM = 1e-3
"""The least distance of a sigmoid from 0 and 1 at the start."""


class LevelTables(nn.Module):
    """The level tables of many blocks of weights at once."""

    def __init__(self, weights: Sequence[Tensor], levels: Sequence[Tensor], is_spaced: bool) -> None:
        """From float32 `weights` [G, B] of each linear and the `levels` [G, 4] of their blocks."""
        super().__init__()
        self.counts = [len(one) for one in levels]
        self.is_spaced = is_spaced
        start = torch.cat(list(levels)).t()
        span = start[-1] - start[0]
        span = torch.where(span > 0, span, 1)
        room = 1 + 2 * ROOM  # so that a level at the very end of its block is possible, too
        middle = torch.clamp(torch.zeros_like(span), start[1], start[2])
        smallest, largest = (torch.cat([end(one, dim=-1) for one in weights]) for end in (torch.amin, torch.amax))
        buffers = {
            "unit": span / (LEVELS - 1),
            "middle": middle,
            "smallest": torch.minimum(smallest - middle, (start[0] - middle) * room),
            "largest": torch.maximum(largest - middle, (start[-1] - middle) * room),
        }
        self.unit: Tensor
        self.middle: Tensor
        """The origin of the ends: 0 for nearly all blocks."""
        self.smallest: Tensor
        self.largest: Tensor
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        shares = _over(start[0] - middle, self.smallest), _over(start[-1] - middle, self.largest)
        self.ends = nn.Parameter(_logits(torch.stack(shares)))
        middles = (start[1:] + start[:-1]) / 2
        self.boundaries = nn.Parameter(_chained((middles - start[0]) / span), requires_grad=not is_spaced)
        self.inner = nn.Parameter(_chained((start[1:-1] - start[0]) / span), requires_grad=not is_spaced)

    def groups(self, options: Tuning) -> list[Group]:
        """The parameters with their rates. Those without a rate stay fixed."""
        rates = (
            (self.ends, options.clip_rate),
            (self.boundaries, options.boundary_rate),
            (self.inner, options.level_rate),
        )
        for parameter, rate in rates:
            parameter.requires_grad_(parameter.requires_grad and rate > 0)
        return [Group([parameter], rate) for parameter, rate in rates if parameter.requires_grad]

    def real_levels(self) -> Tensor:
        """The levels of all blocks before they are stored, float32 [G, 4]."""
        low, high = self._clipped()
        if self.is_spaced:
            return spaced_levels(low, high)
        span = high - low
        return torch.stack([low, *(low + span * share for share in _shares(self.inner)), high], dim=-1)

    def values(self) -> Tensor:
        """The levels as they are stored, float32 [G, 4], with the gradients of the real ones."""
        return PassThrough.apply(self.real_levels(), partial(_as_stored, is_spaced=self.is_spaced))

    def edges(self) -> Tensor:
        """Low, the three boundaries and high of all blocks, in units of each block, float32 [G, 5]."""
        low, high = (end / self.unit for end in self._clipped())
        span = high - low
        shares = _shares(self.boundaries) if not self.is_spaced else (1 / 6, 1 / 2, 5 / 6)
        return torch.stack([low, *(low + span * share for share in shares), high], dim=-1)

    def stored(self) -> NamedParts:
        """The scales and levels of all blocks."""
        return stored_levels(self.real_levels(), self.is_spaced)

    def _clipped(self) -> tuple[Tensor, Tensor]:
        lower, upper = torch.sigmoid(self.ends)
        return self.middle + lower * self.smallest, self.middle + upper * self.largest


def _as_stored(levels: Tensor, is_spaced: bool) -> Tensor:
    return level_values(stored_levels(levels, is_spaced), levels.dtype)


def _shares(chain: Tensor) -> list[Tensor]:
    """Ascending numbers from 0 to 1. Each covers the share of the remaining way to 1 that its sigmoid gives."""
    left, found = None, []
    for rest in torch.sigmoid(-chain):  # 1 - s
        left = rest if left is None else left * rest
        found.append(1 - left)
    return found


def _chained(shares: Tensor) -> Tensor:
    """The inverse of `_shares`, with a small gap where two are equal."""
    before = torch.cat([torch.zeros_like(shares[:1]), shares[:-1]])
    return _logits((shares - before) / (1 - before).clamp(min=ROOM))


def _logits(shares: Tensor) -> Tensor:
    return torch.logit(shares.clamp(ROOM, 1 - ROOM))


def _over(end: Tensor, whole: Tensor) -> Tensor:
    """An end as a share of its block's extreme; 1/2 if that is 0."""
    return torch.where(whole != 0, end / torch.where(whole != 0, whole, 1), 0.5)
