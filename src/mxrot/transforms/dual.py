"""The dual transform of DuQuant (arXiv 2406.01721, section 3.2): rotate, permute, rotate.

If a row of channels shares one scale, as in INT4 per token, blocks must be alike. Two greedy rotations of blocks
(mxrot.transforms.outlier) spread the peaks within a block. One permutation between them evens out the blocks: channels
in decreasing order of max |x|, after the first rotation, are dealt to the blocks back and forth,

    first to blocks 1, 2, ... G, then to G, ... 2, 1, and so on.

The means of max |x| over the channels of two blocks then differ by at most (largest - smallest) / B: from round to
round the sign of their difference alternates, and the amounts are parts of one descending sequence.

Both searches and the order must see the same whole tokens, because the second rotation mixes channels of all blocks.
These are evenly spaced tokens or, as in the released code, the mean of the calibration windows, token by token. In each
block those with the largest peaks are searched, as in DuQuant++. With `sharing = "site"`, one matrix made for the worst
channel of all blocks serves them all, as in the released code. The paper has one per block.

The paper takes blocks of 128, which divide the widths of its models. For other widths (ours) the block is the largest
that divides the width, is a multiple of 32, and has at most `block` channels: 96 for a width of 576.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.transforms.base import FitSize, SiteSample, TransformMethod, Work
from mxrot.transforms.outlier import OutlierRotation
from mxrot.transforms.site_transform import SiteTransform
from mxrot.transforms.stages import BlockDiagonal, Permutation, PermutationSpec, Sharing, StageSpec

UNIT = 32
"""Blocks are multiples of this number of channels, which suits matrix hardware."""


@dataclass(frozen=True)
class DualRotation(TransformMethod):
    """Greedy rotations of blocks before and after a permutation of all channels."""

    name = "dual"

    block: int = field(default=128, kw_only=True)
    """The most channels that one matrix mixes."""
    steps: int = 256
    """The steps of each of the two searches."""
    sample: Literal["spaced", "mean"] = "spaced"
    """Fit to evenly spaced tokens, or to the mean of the calibration windows."""
    rows: int = 512
    """The number of evenly spaced tokens. A search looks at this many rows per block, or at eight times as many for all
    blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.rows < 1:
            raise ConfigError(f"transform dual: steps and rows must be positive, got {self.steps} and {self.rows}")

    @property
    def multiple(self) -> int:
        return math.gcd(self.block, UNIT)

    def block_in(self, width: int) -> int:
        sizes = range(self.multiple, self.block + 1, self.multiple)
        return max((size for size in sizes if width % size == 0), default=self.block)

    def own_specs(self, width: int, sharing: Sharing) -> tuple[StageSpec, ...]:
        (rotation,) = super().own_specs(width, sharing)
        return rotation, PermutationSpec(), rotation

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.sample})

    @property
    def tokens_kept(self) -> int:
        return self.rows

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> SiteTransform:
        tokens = self._tokens(sample)
        search = self._search(sample.block)

        def rotation_of(x: Tensor) -> BlockDiagonal:
            blocks = x.unflatten(1, (-1, sample.block)).transpose(0, 1).contiguous()
            return search.fit(replace(sample, seen={"peaks": blocks}), sharing, generator)

        first = rotation_of(tokens)
        tokens = first.apply(tokens)
        order = zigzag_order(torch.linalg.vector_norm(tokens, ord=torch.inf, dim=0), sample.block)
        second = rotation_of(tokens[:, order])
        return SiteTransform((first, Permutation(order), second))

    def _tokens(self, sample: SiteSample) -> Tensor:
        """The tokens that the transform is fitted to, float32 [rows, K]."""
        seen = sample.seen[self.sample]
        return seen if self.sample == "mean" else seen.transpose(0, 1).flatten(1)

    def _search(self, block: int) -> OutlierRotation:
        return OutlierRotation(block=block, steps=self.steps, rows=self.rows)

    def fitting_bytes(self, size: FitSize) -> float:
        """The bytes of a search, of the tokens before and after the first rotation and in blocks, and of the first
        rotation."""
        block = self.block_in(size.width)
        count = 1 if size.sharing == "site" else size.width // block
        held = 3 * 4.0 * self.rows * size.width + 8.0 * count * block**2
        return self._search(block).fitting_bytes(size) + held

    def fitting_work(self, size: FitSize) -> Work:
        """The units of the two searches."""
        found = self._search(self.block_in(size.width)).fitting_work(size)
        return {name: 2 * amount for name, amount in found.items()}

    def trial(self, device: torch.device) -> tuple[Callable[[], object], float] | None:
        return self._search(self.block).trial(device)


def zigzag_order(maxima: Tensor, block: int) -> Tensor:
    """Where channels with these maxima [K] go: int64 [K], the channel at each place, block after block.

    The largest go to the first places of all blocks, from the first block to the last. The next largest go to the
    second places, from the last block to the first, and so on. Equal ones keep their order.
    """
    rounds = maxima.sort(descending=True, stable=True).indices.unflatten(0, (block, -1))
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.t().flatten()
