"""softmax(q k^T) v, slice by slice, where some keys and values are read from codes and others in 16 bits.

Keys are visited in slices, and for each slice the queries in slices. For each query the sum so far is kept, with its
largest score so far and the sum of its weights. A larger score rescales both sums (Milakov and Gimelshein, arXiv
1805.02867; FlashAttention, 2205.14135, section 3.1). Each slice of keys is therefore dequantized once, and memory is
bounded. Products and sums are float32, or float64 for queries in float64.

Query t reads key and value j in 16 bits if t - j < last, or if j is among the `first` tokens that are not padding. Each
pair of t and j is counted once: with the codes, with the first tokens, or with the last tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats import CacheScheme
from mxrot.layers.installed_cache import CacheMatrices
from mxrot.layers.quantized_attention import NUMBERS_AT_ONCE, seen_in

KEYS_AT_ONCE = 4096


class Reading(ABC):
    """Keys and values of the tokens that attention reads, the newest last; float32 or float64."""

    count: int

    @abstractmethod
    def codes(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Q(k T) and Q(v U) of tokens `start` to `stop`, [B, heads, n, D]."""

    @abstractmethod
    def exact(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """k and v of tokens `start` to `stop`, for queries near enough to read them in 16 bits."""

    @abstractmethod
    def leading(self) -> tuple[Tensor, Tensor, Tensor]:
        """k and v of the first tokens of each sequence [B, heads, first, D], and the positions where they begin, int64
        [B]. A position below 0 has left the window."""


@dataclass(frozen=True)
class Call:
    """The queries of a call, and what they see."""

    query: Tensor
    """The query times the scale of scores, float32 or float64 [B, heads of keys, heads that share them, T, D]."""
    matrices: CacheMatrices
    mask: Tensor | None
    """Flags, or numbers to add, [B or 1, 1, T, keys]."""
    places: Tensor
    """The position of each query among the keys, int64 [B or 1, T]."""
    places_are_last: bool
    """True if query i of T is known to be at the i-th of the last T positions."""
    softcap: float | None

    def scores(self, rows: slice, keys: Tensor, mask: Tensor | None, is_exact: bool) -> Tensor:
        """Scores [B, heads of keys, sharing heads, rows, n]. `mask` is for these rows and keys."""
        query = self.query[:, :, :, rows]
        if not is_exact and self.matrices.queries is not None:
            query = query @ self.matrices.queries[:, None]
        found = (query.flatten(2, 3) @ keys.mT).unflatten(2, query.shape[2:4])
        if self.softcap is not None:
            found = (found / self.softcap).tanh() * self.softcap
        return found if mask is None or mask.dtype == torch.bool else found + mask

    def distance(self, rows: slice, keys: Tensor) -> Tensor:
        """t - j for keys at these positions [n] or [B, n]: int64 [B or 1, 1, 1, rows, n]."""
        return (self.places[:, rows, None] - keys.view(-1, 1, keys.shape[-1]))[:, None, None]

    def keys_near(self, rows: slice, columns: slice, count: int, last: int) -> slice:
        """The part of `columns` that is near a query of these rows, or a larger part."""
        start, stop = 0, count if last else 0
        if self.places_are_last and last:
            before = count - self.query.shape[3]
            start, stop = before + rows.start - last + 1, before + rows.stop
        start = min(max(start, columns.start), columns.stop)
        return slice(start, max(start, min(stop, columns.stop)))

    def come_after(self, rows: slice, columns: slice, count: int) -> bool:
        """True if all these queries are known to come after these keys, or at the last one."""
        return self.places_are_last and columns.stop <= count - self.query.shape[3] + rows.start + 1


class _Sums:
    """The sums of some queries so far."""

    def __init__(self) -> None:
        self.largest: Tensor | None = None

    def add(self, scores: Tensor, seen: Tensor | None, values: Tensor, is_exact: bool) -> None:
        """Add `values` [B, heads of keys, n, D], with the weights exp(scores), where they are seen. Default:
        everywhere."""
        in_place = not scores.requires_grad  # the caller does not use `scores` again
        if seen is not None:
            scores = scores.masked_fill_(~seen, -torch.inf) if in_place else scores.masked_fill(~seen, -torch.inf)
        largest = scores.detach().amax(dim=-1, keepdim=True)
        if self.largest is not None:
            largest = torch.maximum(largest, self.largest)
        finite = largest.masked_fill(largest == -torch.inf, 0)
        weights = scores.sub_(finite).exp_() if in_place else (scores - finite).exp()
        summed = (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4])
        total = weights.sum(dim=-1, keepdim=True)
        if self.largest is None:
            self.total, self.summed = total, [torch.zeros_like(summed), torch.zeros_like(summed)]
        else:
            factor = (self.largest - finite).exp()
            self.total, self.summed = self.total * factor + total, [x * factor for x in self.summed]
        self.summed[is_exact] = self.summed[is_exact] + summed
        self.largest = largest

    def result(self, matrices: CacheMatrices) -> Tensor:
        """The output [B, heads of keys, sharing heads, rows, D]. A query that sees nothing is padding, and gets
        zeros."""
        turned, exact = self.summed
        if matrices.outputs is not None:
            turned = turned @ matrices.outputs[:, None]
        return (turned + exact) / self.total.masked_fill(self.total == 0, 1)


def attend(call: Call, reading: Reading, scheme: CacheScheme) -> Tensor:
    """The outputs of the heads, float32 or float64 [B, heads, T, D]."""
    batch, kept, shared, queries, width = call.query.shape
    numbers = NUMBERS_AT_ONCE.get(call.query.device.type, NUMBERS_AT_ONCE["cpu"])
    keys = max(1, min(reading.count, KEYS_AT_ONCE, numbers // (batch * kept * width)))
    step = max(1, numbers // (batch * kept * shared * keys))
    slices = [(slice(start, min(start + step, queries)), _Sums()) for start in range(0, queries, step)]
    leading = reading.leading() if scheme.first else None
    for start in range(0, reading.count, keys):
        columns = slice(start, min(start + keys, reading.count))
        read = reading.codes(columns.start, columns.stop)
        for rows, sums in slices:
            if call.places_are_last and reading.count - queries + rows.stop <= start:
                continue  # all of these queries come before these keys
            _add_slice(call, reading, scheme, rows, columns, read, None if leading is None else leading[2], sums)
    if leading is not None:
        for rows, sums in slices:
            _add_leading(call, rows, leading, reading.count, sums)
    return torch.cat([sums.result(call.matrices) for _, sums in slices], dim=3).flatten(1, 2)


def _add_slice(
    call: Call,
    reading: Reading,
    scheme: CacheScheme,
    rows: slice,
    columns: slice,
    read: tuple[Tensor, Tensor],
    leading: Tensor | None,
    sums: _Sums,
) -> None:
    """Add the keys at `columns`, except those among the first tokens, which begin at the positions `leading` [B]."""
    places = torch.arange(columns.start, columns.stop, device=call.places.device)
    mask = None if call.mask is None else call.mask[:, :, None, rows, columns]
    seen = None if mask is None else seen_in(mask)
    if mask is None and not call.come_after(rows, columns, reading.count):
        seen = call.distance(rows, places) >= 0
    if leading is not None:
        after = (places - leading[:, None])[:, None, None, None]
        seen = _both(seen, (after < 0) | (after >= scheme.first))
    near = call.keys_near(rows, columns, reading.count, scheme.last)
    if near.start < near.stop:
        is_near = call.distance(rows, places) < scheme.last
        inside = slice(near.start - columns.start, near.stop - columns.start)
        k, v = reading.exact(near.start, near.stop)
        scores = call.scores(rows, k, None if mask is None else mask[..., inside], is_exact=True)
        sums.add(scores, _both(seen, is_near)[..., inside], v, is_exact=True)
        seen = _both(seen, ~is_near)
    sums.add(call.scores(rows, read[0], mask, is_exact=False), seen, read[1], is_exact=False)


def _both(seen: Tensor | None, flags: Tensor) -> Tensor:
    return flags if seen is None else seen & flags


def _add_leading(call: Call, rows: slice, leading: tuple[Tensor, Tensor, Tensor], count: int, sums: _Sums) -> None:
    k, v, begin = leading
    places = begin[:, None] + torch.arange(k.shape[2], device=begin.device)
    there = ((places >= 0) & (places < count))[:, None, None, None]
    mask = None
    if call.mask is not None:
        index = places.clamp(0, count - 1)[:, None, None].expand(-1, -1, rows.stop - rows.start, -1)
        mask = call.mask[:, :, rows].expand(len(begin), -1, -1, -1).gather(3, index)[:, :, None]
    seen = there & (call.distance(rows, places) >= 0 if mask is None else seen_in(mask))
    sums.add(call.scores(rows, k, mask, is_exact=True), seen, v, is_exact=True)
