"""The weights of a site in float64, unchanged or folded against its transform, some rows at a time.

gate and up of a 70B model take 3.8 GB in float64, and rounding several times that. Rows do not depend on each other, so
above a bound they are taken in groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mxrot.kernels import weight_parts
from mxrot.transforms import SiteTransform

MOST_TOGETHER = 1 << 27
"""The most float64 weights of a site (1 GiB) for which all rows are taken together. For other numbers of rows a library
may use another kernel, which sums in another order. Up to the bound, which covers models of 8B parameters, the bits are
those of products with all rows."""
ELEMENTS_AT_ONCE = 1 << 26
"""The number of weights taken together above that."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a site's linears."""

    pieces: tuple[tuple[str, int, int], ...]
    """The names of linears, each with its first row and the row after its last."""
    place: slice
    """The place among the rows of all linears, one linear below the other."""

    @property
    def counts(self) -> list[int]:
        """The number of rows of each piece."""
        return [stop - start for _, start, stop in self.pieces]

    def share(self, rank: int, size: int) -> Rows:
        """The rows of process `rank` out of `size`: equal shares, one after the other."""
        height = sum(self.counts)
        start, stop = height * rank // size, height * (rank + 1) // size
        found, before = [], 0
        for name, first, last in self.pieces:
            own = max(first, first + start - before), min(last, first + stop - before)
            if own[0] < own[1]:
                found.append((name, *own))
            before += last - first
        return Rows(tuple(found), slice(self.place.start + start, self.place.start + stop))


def together(weights: Mapping[str, Tensor], linears: Sequence[str]) -> Tensor:
    """All rows of these linears, float64 [N, K]."""
    return _one_above_other([weights[name] for name in linears])


def to_fit_to(weights: Mapping[str, Tensor], linears: Sequence[str], scales: Tensor | None) -> Tensor:
    """All rows of these linears [N, K], times smoothing scales [K]: float64, or their own type above the bound.

    gate and up of all experts of a block are above it. A method converts as much to float64 as it takes at once.
    """
    if scales is not None:
        return together(weights, linears) * scales
    pieces = [weights[name] for name in linears]
    is_small = sum(piece.numel() for piece in pieces) <= MOST_TOGETHER
    return _one_above_other(pieces) if is_small else torch.cat(pieces)


def _one_above_other(pieces: Sequence[Tensor]) -> Tensor:
    """float64 [N, K] from pieces [n, K] of any dtype, without a float64 copy of each piece."""
    shape = sum(len(piece) for piece in pieces), pieces[0].shape[1]
    found = torch.empty(shape, dtype=torch.float64, device=pieces[0].device)
    for place, piece in zip(found.split([len(piece) for piece in pieces]), pieces, strict=True):
        place.copy_(piece)
    return found


@dataclass(frozen=True, eq=False)
class SiteWeights:
    """The weights of the linears of a site, [N, K] in total."""

    weights: Mapping[str, Tensor]
    """The weights [rows, K] by name, of any floating-point dtype; may include others than those of the site."""
    linears: Sequence[str]
    transform: SiteTransform | None = None
    """The transform as it is applied."""

    @cached_property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return sum(self._heights.values()), self.weights[self.linears[0]].shape[1]

    @cached_property
    def _heights(self) -> dict[str, int]:
        return {name: len(self.weights[name]) for name in self.linears}

    @property
    def is_taken_whole(self) -> bool:
        """True if all of them may be taken together."""
        return self.shape[0] * self.shape[1] <= MOST_TOGETHER

    @cached_property
    def whole_linears(self) -> list[Rows]:
        """The rows of one linear after the other."""
        found, first = [], 0
        for name, height in self._heights.items():
            found.append(Rows(((name, 0, height),), slice(first, first + height)))
            first += height
        return found

    @cached_property
    def groups(self) -> list[Rows]:
        """All rows, in groups that fit into memory."""
        if self.is_taken_whole:
            pieces = tuple(piece for rows in self.whole_linears for piece in rows.pieces)
            return [Rows(pieces, slice(0, self.shape[0]))]
        count = max(1, ELEMENTS_AT_ONCE // self.shape[1])
        found = []
        for linear in self.whole_linears:
            ((name, _, height),) = linear.pieces
            for start in range(0, height, count):
                stop = min(start + count, height)
                found.append(Rows(((name, start, stop),), slice(linear.place.start + start, linear.place.start + stop)))
        return found

    def as_read(self, rows: Rows) -> Tensor:
        """float64, for the untransformed inputs."""
        return _one_above_other([self.weights[name][start:stop] for name, start, stop in rows.pieces])

    def folded(self, rows: Rows) -> Tensor:
        """float64, for the transformed inputs."""
        if self.transform is None:
            return self.as_read(rows)
        if self.is_taken_whole:
            return self._all_folded[rows.place]
        return self.transform.fold(self.as_read(rows))

    def all_folded(self) -> Tensor:
        """All rows, float64 [N, K], however many they are; read-only."""
        if len(self.groups) == 1:
            return self.folded(self.groups[0])
        found = torch.empty(self.shape, dtype=torch.float64, device=self.weights[self.linears[0]].device)
        for rows in self.groups:
            found[rows.place] = self.folded(rows)
        return found

    @cached_property
    def _all_folded(self) -> Tensor:
        """Cached, because they are used several times."""
        assert self.transform is not None
        found = torch.empty(self.shape, dtype=torch.float64, device=self.weights[self.linears[0]].device)
        for name, rows in zip(self.linears, self.whole_linears, strict=True):
            found[rows.place] = self.transform.fold(self.weights[name])
        return found

    def parts(self, dtype: torch.dtype) -> Tensor:
        """The parts that `kernels.weight_parts` gives for inputs of `dtype`, of all rows."""
        found = [weight_parts(self.as_read(rows), dtype) for rows in self.groups]
        if len(found) == 1:
            return found[0]
        heights = [rows.place.stop - rows.place.start for rows in self.groups]
        firsts = [parts[:height] for parts, height in zip(found, heights, strict=True)]
        if all(len(parts) == height for parts, height in zip(found, heights, strict=True)):
            return torch.cat(firsts)
        rests = [
            parts[height:] if len(parts) > height else torch.zeros_like(parts)
            for parts, height in zip(found, heights, strict=True)
        ]
        return torch.cat(firsts + rests)
