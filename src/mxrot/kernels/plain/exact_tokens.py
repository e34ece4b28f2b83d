"""Tokens that attention reads as they came, beside those of a packed cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ExactTokens:
    """Of one layer, for one token a sequence: which tokens are read so, and what they are.

    Those are the newest `last`, and those at places `begins` to `begins + first`. Each is read in one place alone.
    """

    query: Tensor
    """As it came, [B, heads, 1, D]."""
    first: int = 0
    last: int = 0
    recent: Pair | None = None
    """Keys and values [B, kv heads, ring, D], contiguous: token j is row (j + shift) % ring. None where last is 0."""
    shift: int = 0
    """At least 0."""
    leading: Pair | None = None
    """Of the first tokens [B, kv heads, first or more, D], contiguous; None where first is 0."""
    begins: Tensor | None = None
    """int64 [B]: where they begin, `skipped` more than among the tokens that attention is given."""
    skipped: int = 0

    def keep(self, key: Tensor, value: Tensor, position: int | Tensor, visible: Tensor | None) -> None:
        """Write one token of each sequence, [B, kv heads, 1, D] at `position`, an int or int64 [1] on the device, where
        it belongs: into the ring, and among the first ones if it is one.

        Tokens come one after the other from position 0 on, which forgets what was noted. Those whose flags in `visible`
        [B, N] are 0, before the first one that is not, are padding: `begins` is how many.
        """
        position = torch.as_tensor(position, device=key.device).reshape(1)
        if self.recent is not None:
            row = (position + self.shift) % self.recent[0].shape[2]
            for ring, new in zip(self.recent, (key, value), strict=True):
                ring.index_copy_(2, row, new)
        if self.leading is None or self.begins is None:
            return
        begins = self.begins.masked_fill(position == 0, 0)
        if visible is not None:
            is_hidden = visible.index_select(1, position)[:, 0] == 0
            begins = begins + ((begins == position) & is_hidden)
        self.begins.copy_(begins)
        place = (position - begins)[:, None, None, None]
        is_first = (place >= 0) & (place < self.first)
        for rows, new in zip(self.leading, (key, value), strict=True):
            index = place.clamp(0, self.first - 1).expand_as(new)
            rows.scatter_(2, index, torch.where(is_first, new, rows.gather(2, index)))

    def first_flags(self, places: Tensor) -> Tensor:
        """Which tokens at these places [n] are among the first ones, bool [B or 1, n]."""
        if self.begins is None:
            return torch.zeros_like(places, dtype=torch.bool)[None]
        after = places - (self.begins[:, None] - self.skipped)
        return (after >= 0) & (after < self.first)

    def overlay(self, keys: Tensor, values: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, kv heads, n, D] of tokens, those that are read as they came in their places, in the type
        that `keys` has, and flags of them [B, n]."""
        count, batch = keys.shape[2], len(keys)
        places = torch.arange(count, device=keys.device)
        is_first = self.first_flags(places).expand(batch, -1)
        is_recent = ((places >= length - self.last) & (places < length)).expand(batch, -1) & ~is_first
        found = [keys, values]
        if self.recent is not None:
            row = (places + self.shift) % self.recent[0].shape[2]
            rows = [of.index_select(2, row) for of in self.recent]
            found = [_chosen(is_recent, new, x) for x, new in zip(found, rows, strict=True)]
        if self.leading is not None and self.begins is not None:
            index = (places - (self.begins[:, None] - self.skipped)).clamp(0, self.first - 1)[:, None, :, None]
            rows = [of.gather(2, index.expand(-1, of.shape[1], -1, of.shape[3])) for of in self.leading]
            found = [_chosen(is_first, new, x) for x, new in zip(found, rows, strict=True)]
        return found[0], found[1], is_first | is_recent


def _chosen(flags: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Tokens [B, heads, n, D] of `new` where flags [B, n] are set, in the type of `old`."""
    return torch.where(flags[:, None, :, None], new.to(old.dtype), old)
