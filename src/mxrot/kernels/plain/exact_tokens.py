"""Tokens that attention reads unquantized, beside those of a packed cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ExactTokens:
    """The unquantized tokens of one layer, for a step of one token per sequence.

    These are the newest `last` tokens, and those at places `begins` to `begins + first`. Each token is read from only
    one of the two.
    """

    query: Tensor
    """The untransformed query, [B, heads, 1, D]."""
    first: int = 0
    last: int = 0
    recent: Pair | None = None
    """Keys and values [B, kv heads, ring, D], contiguous. Token j is in row (j + shift) % ring. None if last is 0."""
    shift: int = 0
    """Not negative."""
    leading: Pair | None = None
    """Keys and values of the first tokens [B, kv heads, first or more, D], contiguous. None if first is 0."""
    begins: Tensor | None = None
    """int64 [B]: where the first tokens begin. Among the tokens that attention gets, it is `skipped` less."""
    skipped: int = 0

    def keep(self, key: Tensor, value: Tensor, position: int | Tensor, visible: Tensor | None) -> None:
        """Store one token of each sequence, [B, kv heads, 1, D], at `position`, an int or int64 [1] on the device: in
        the ring, and among the first tokens if it is one of them.

        Tokens come in order from position 0 on; position 0 resets earlier notes. Tokens before the first one whose flag
        in `visible` [B, N] is not 0 are padding, and `begins` is their number.
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
        """Flags of the first tokens among those at these places [n], bool [B or 1, n]."""
        if self.begins is None:
            return torch.zeros_like(places, dtype=torch.bool)[None]
        after = places - (self.begins[:, None] - self.skipped)
        return (after >= 0) & (after < self.first)

    def overlay(self, keys: Tensor, values: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, kv heads, n, D] with the unquantized tokens in their places, in the type of `keys`, and
        their flags [B, n]."""
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
    """Tokens [B, heads, n, D] of `new` where the flags [B, n] are set, otherwise of `old`, in the type of `old`."""
    return torch.where(flags[:, None, :, None], new.to(old.dtype), old)
