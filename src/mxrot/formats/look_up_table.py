"""A grid in which each block has its own four values: a table of levels, indexed by two-bit codes.

A level is scale * i. Each block has a scale in FP16 and four ascending integers i from -127 to 127: 48 bits beside the
codes. Because i is an integer, a product with integer inputs within a block is exact in int32. The values need not be
equally spaced; a rule chooses them:

- "spaced": four equally spaced values from the smallest element of the block to the largest, after the clip of the
  rule: clipped asymmetric INT2. Their integers are equally spaced, too.
- "lloyd": the four values with the least squared error of the elements, each rounded to the nearest. They are found
  exactly: in sorted order, the elements of a level are neighbours, so the best four groups of the first j elements
  follow from the best three of the first i < j (one-dimensional k-means by dynamic programming; Wang and Song, R
  Journal 3(2), 2011).

Both find real levels and round them to the stored form afterwards. This adds an error of at most 1/254 of the largest
level, a hundredth of the error of two-bit codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats.grid import Grid
from mxrot.formats.parts import NamedParts, Parts, PartSpec
from mxrot.formats.scale import ScaleRule

LEVELS = 4
LARGEST_INTEGER = 127
TABLE_ELEMENTS = 1 << 22
"""The number of elements of the cost tables that exist at once. A table has B^2 elements."""


@dataclass(frozen=True)
class LookUpTable(Grid):
    """Two-bit codes, each an index into the levels of the block.

    An element is rounded to the nearest level, to the lower one in a tie. A block of zeros has scale 0, levels 0, and
    code 0 everywhere. A level beyond 127 * 65504 makes the scale Inf, which `quantize` refuses.
    """

    @property
    def bits(self) -> int:
        return 2

    def parts(self, rule: ScaleRule) -> tuple[PartSpec, ...]:
        return PartSpec("scale", torch.float16, 16), PartSpec("levels", torch.int8, 8, shape=(LEVELS,))

    def choose(self, blocks: Tensor, rule: ScaleRule) -> NamedParts:
        if rule.sees_extremes_only:
            low, high = rule.cut(blocks.amin(dim=-1)), rule.cut(blocks.amax(dim=-1))
            return stored_levels(spaced_levels(low, high), is_spaced=True)
        poison = (blocks - blocks).sum(dim=-1, keepdim=True)  # NaN if the block holds NaN or Inf
        return stored_levels(nearest_levels(blocks) + poison)

    def encode(self, blocks: Tensor, parts: Parts) -> Tensor:
        levels = level_values(parts, blocks.dtype)
        middles = (levels[..., 1:] + levels[..., :-1]) / 2  # exact: the levels are products of 18 bits
        return codes_between(blocks, middles)

    def round(self, blocks: Tensor, parts: Parts) -> Tensor:
        levels = level_values(parts, blocks.dtype)
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        # One operation finds all codes. GPTQ rounds column by column, and a GPU's time depends on the number of
        # operations.
        return levels.gather(-1, torch.searchsorted(middles, blocks.contiguous()))

    def decode(self, codes: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        return level_values(parts, dtype).gather(-1, codes.long())

    def is_within_float32(self, parts: Parts) -> bool:
        return self.not_finite(parts) is None


def codes_between(blocks: Tensor, boundaries: Tensor) -> Tensor:
    """The number of ascending `boundaries` [..., G, 3] below each element of `blocks` [..., G, B]: uint8."""
    codes = torch.zeros_like(blocks, dtype=torch.uint8)
    for boundary in boundaries.unbind(dim=-1):
        codes += blocks > boundary[..., None]
    return codes


def level_values(parts: Parts, dtype: torch.dtype) -> Tensor:
    """The levels as numbers, [..., G, 4]; exact in float32 and float64."""
    scale, levels = parts.tensors["scale"], parts.tensors["levels"]
    return scale.to(dtype)[..., None] * levels.to(dtype)


def stored_levels(levels: Tensor, is_spaced: bool = False) -> NamedParts:
    """Ascending real `levels` [..., G, 4] in stored form: the largest magnitude becomes 127, the others the nearest
    integer.

    With `is_spaced` all distances equal the first one, which is a whole number of scales.
    """
    largest = levels.abs().amax(dim=-1)
    if is_spaced:
        step = levels[..., 1] - levels[..., 0]
        # The largest integer step for which no level goes beyond 127, whatever the first level is.
        count = (step * (LARGEST_INTEGER - 1) / torch.where(largest > 0, largest, 1)).floor().clamp(min=1)
        scale = (step / count).to(torch.float16)
    else:
        scale = (largest / LARGEST_INTEGER).to(torch.float16)
    wide = scale.to(levels.dtype)
    relative = levels / torch.where(wide > 0, wide, torch.inf)[..., None]
    if is_spaced:
        first = relative[..., :1].round()
        relative = first + count[..., None] * torch.arange(LEVELS, device=levels.device, dtype=levels.dtype)
        relative = torch.where(wide[..., None] > 0, relative, 0)
    integers = relative.round().clamp(-LARGEST_INTEGER, LARGEST_INTEGER).nan_to_num()
    return NamedParts({"scale": scale + (largest - largest).to(torch.float16), "levels": integers.to(torch.int8)})


def spaced_levels(low: Tensor, high: Tensor) -> Tensor:
    """Four equally spaced levels [..., G, 4], from `low` to `high` [..., G]."""
    steps = torch.arange(LEVELS, dtype=low.dtype, device=low.device) / (LEVELS - 1)
    return low[..., None] + (high - low)[..., None] * steps


def nearest_levels(blocks: Tensor) -> Tensor:
    """The four levels [..., 4] with the least sum of squared distances to the elements of `blocks` [..., B].

    Levels have the type of `blocks`. Elements are taken relative to the largest magnitude. If a block has fewer than
    four different elements, some levels are equal.
    """
    flat = blocks.reshape(-1, blocks.shape[-1])
    count = max(1, TABLE_ELEMENTS // max(1, flat.shape[-1] ** 2))
    found = [_nearest_levels(piece) for piece in flat.split(count)]
    return torch.cat(found).view(*blocks.shape[:-1], LEVELS)


def _nearest_levels(blocks: Tensor) -> Tensor:
    """For blocks [M, B]."""
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    x = (blocks / torch.where(largest > 0, largest, 1)).sort(dim=-1).values
    size = x.shape[-1]
    place = torch.arange(size, device=x.device)
    nothing = x.new_zeros(len(x), 1)
    sums = torch.cat([nothing, x.cumsum(dim=-1)], dim=-1)
    squares = torch.cat([nothing, x.square().cumsum(dim=-1)], dim=-1)
    counts = (place[None, :] - place[:, None] + 1).clamp(min=1)
    # The cost of elements i to j under their mean. For j < i the group is empty and its cost infinite.
    total = sums[:, None, 1:] - sums[:, :-1, None]
    cost = (squares[:, None, 1:] - squares[:, :-1, None]).sub_(total.square_().div_(counts))
    cost = cost.clamp_(min=0).masked_fill_(place[None, :] < place[:, None], torch.inf)
    best, begins = cost[:, 0], []
    for _ in range(LEVELS - 1):
        # The last group starts at element i, and the earlier groups hold the first i elements.
        before = torch.cat([nothing, best[:, :-1]], dim=-1)
        best, begin = (before[:, :, None] + cost).min(dim=1)
        begins.append(begin)
    ends, last = [], torch.full_like(begins[0][:, :1], size)
    for begin in reversed(begins):
        ends.append(last)
        last = begin.gather(-1, (last - 1).clamp(min=0))
    ends.append(last)
    edges = torch.cat([torch.zeros_like(last), *reversed(ends)], dim=-1)
    held = edges.diff(dim=-1)
    means = sums.gather(-1, edges).diff(dim=-1) / held.clamp(min=1)
    # An empty group precedes all others, which hold the elements from the first on.
    return torch.where(held > 0, means, x[:, :1]) * largest
