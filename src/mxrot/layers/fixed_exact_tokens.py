"""The 16-bit tokens of a `FixedPackedCache` for one attention module, at fixed addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.formats import CacheScheme
from mxrot.kernels import ExactTokens


class FixedExactTokens:
    """For each sequence, a ring of the newest `last` tokens, and the `first` tokens that are not padding.

    Padding is what the mask hides from the newest token, starting at position 0. Without masks there is none.
    """

    def __init__(self, scheme: CacheScheme, like: Tensor) -> None:
        """`like` gives the shape and type of keys or values, [B, heads, 1, D]."""
        batch, heads, _, width = like.shape
        self.first, self.last = scheme.first, scheme.last

        def empty(rows: int) -> tuple[Tensor, Tensor]:
            return like.new_zeros(batch, heads, rows, width), like.new_zeros(batch, heads, rows, width)

        self.recent = empty(self.last) if self.last else None
        self.leading = empty(self.first) if self.first else None
        self.begins = torch.zeros(batch, dtype=torch.int64, device=like.device)

    @property
    def tensors(self) -> list[Tensor]:
        """All key and value tensors."""
        return [x for pair in (self.recent, self.leading) if pair is not None for x in pair]

    @property
    def nbytes(self) -> int:
        """The bytes of all rows."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def read_by(self, query: Tensor) -> ExactTokens:
        """The tokens as a step of this query [B, heads, 1, D] writes and reads them."""
        begins = self.begins if self.first else None
        return ExactTokens(query, self.first, self.last, self.recent, 0, self.leading, begins)
