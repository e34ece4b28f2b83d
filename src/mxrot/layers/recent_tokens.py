"""The newest keys and values, unquantized, in a ring buffer: appending a token copies no other token.

Token j is in row j % capacity. The ring grows if it has fewer rows than tokens to keep, with spare rows. It shrinks
after a call that has brought many tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 32
"""A growing ring gets this many spare rows, and no ring keeps more of them."""

Pair = tuple[Tensor, Tensor]
"""Keys and values, [B, heads, tokens, D] each."""


class RecentTokens:
    """Tokens `end - length` to `end`."""

    def __init__(self) -> None:
        self.rings: Pair | None = None
        """Keys and values, [B, heads, capacity, D] each."""
        self.length = 0
        self.end = 0

    @property
    def capacity(self) -> int:
        return 0 if self.rings is None else self.rings[0].shape[2]

    @property
    def nbytes(self) -> int:
        """The bytes of the rings, with unused rows."""
        return 0 if self.rings is None else sum(ring.nbytes for ring in self.rings)

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor) -> None:
        """Store tokens [B, heads, n, D]."""
        tokens = key.shape[2]
        self.reserve(tokens, (key, value))
        assert self.rings is not None
        row = self.end % self.capacity
        before_the_turn = min(tokens, self.capacity - row)
        for ring, new in zip(self.rings, (key, value), strict=True):
            ring[:, :, row : row + before_the_turn] = new[:, :, :before_the_turn]
            if before_the_turn < tokens:
                ring[:, :, : tokens - before_the_turn] = new[:, :, before_the_turn:]
        self.written(tokens)

    def reserve(self, tokens: int, like: Pair) -> None:
        """Make room for `tokens` more tokens, from row `end` on, modulo the capacity."""
        if self.rings is None or self.length + tokens > self.capacity:
            self._move(self.length + tokens + (ROOM if self.length else 0), like)

    def written(self, tokens: int) -> None:
        """Count `tokens` tokens that were written into the room."""
        self.end += tokens
        self.length += tokens

    def keep(self, tokens: int) -> None:
        """Drop all but the newest `tokens` tokens, and rows that these and one more token do not need."""
        self.length = min(self.length, tokens)
        if self.rings is not None and self.capacity > tokens + 1 + ROOM:
            self._move(tokens + 1, self.rings)

    def drop_last(self, tokens: int) -> None:
        """Forget `tokens` tokens at the end."""
        self.end -= tokens
        self.length = max(0, self.length - tokens)

    def read(self, start: int, stop: int) -> Pair:
        """Tokens `start` to `stop` of those that are kept. The result is a view if they are contiguous."""
        assert self.rings is not None and 0 <= start <= stop <= self.length
        row = (self.end - self.length + start) % self.capacity
        rest = row + stop - start - self.capacity
        if rest <= 0:
            key, value = (ring[:, :, row : row + stop - start] for ring in self.rings)
        else:
            key, value = (torch.cat([ring[:, :, row:], ring[:, :, :rest]], dim=2) for ring in self.rings)
        return key, value

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences of the batch, int64 [B'], in this order. A sequence may occur several times."""
        if self.rings is not None:
            key, value = (ring.index_select(0, sequences) for ring in self.rings)
            self.rings = key, value

    def _move(self, capacity: int, like: Pair) -> None:
        """New rings with `capacity` rows, with the tokens that are kept."""
        with torch.inference_mode(False):  # makes rings that can be written in any mode
            made = tuple(x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in like)
        if self.length:
            rows = torch.arange(self.end - self.length, self.end, device=made[0].device) % capacity
            for ring, kept in zip(made, self.read(0, self.length), strict=True):
                ring.index_copy_(2, rows, kept)
        self.rings = made[0], made[1]
