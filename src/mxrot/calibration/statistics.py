"""What calibration remembers of the inputs of a site, batch after batch.

Each collector sees batches [windows, tokens, K] and keeps something small on the same device. A transform
method asks for a collector by its name in COLLECTORS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Collector(ABC):
    """Accumulates one statistic."""

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in one batch [windows, tokens, K] of any floating-point dtype."""

    @abstractmethod
    def result(self) -> Tensor:
        """The statistic over all batches so far."""


class ChannelMaxima(Collector):
    """max |x| of each channel: float32 [K]. NaN where a NaN was seen."""

    def __init__(self) -> None:
        self.maxima: Tensor | None = None

    def update(self, x: Tensor) -> None:
        seen = x.abs().flatten(0, -2).amax(dim=0).float()
        self.maxima = seen if self.maxima is None else torch.maximum(self.maxima, seen)

    def result(self) -> Tensor:
        assert self.maxima is not None
        return self.maxima


class PeakBlocks(Collector):
    """Of each block of channels, the tokens with the largest max |x|: float32 [G, rows, B], largest first."""

    def __init__(self, block: int, rows: int) -> None:
        self.block, self.rows = block, rows
        self.kept: Tensor | None = None

    def update(self, x: Tensor) -> None:
        blocks = x.flatten(0, -2).unflatten(-1, (-1, self.block)).transpose(0, 1)
        top = self._largest(blocks).float()
        self.kept = top if self.kept is None else self._largest(torch.cat([self.kept, top], dim=1))

    def _largest(self, blocks: Tensor) -> Tensor:
        order = blocks.abs().amax(dim=-1).topk(min(self.rows, blocks.shape[1]), dim=1).indices
        return torch.take_along_dim(blocks, order[..., None], dim=1)

    def result(self) -> Tensor:
        assert self.kept is not None
        return self.kept


class SpacedBlocks(Collector):
    """Of each batch rows / 8 evenly spaced tokens, cut into blocks: float32 [G, all of them, B]."""

    def __init__(self, block: int, rows: int) -> None:
        self.block, self.rows_a_batch = block, max(1, rows // 8)
        self.kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        taken = flat[:: max(1, len(flat) // self.rows_a_batch)][: self.rows_a_batch].float()
        self.kept.append(taken.unflatten(-1, (-1, self.block)).transpose(0, 1))

    def result(self) -> Tensor:
        return torch.cat(self.kept, dim=1)


class MeanWindow(Collector):
    """The mean over windows, token by token: float32 [tokens, K]."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.windows = 0

    def update(self, x: Tensor) -> None:
        total = x.float().sum(dim=0)
        self.total = total if self.total is None else self.total + total
        self.windows += x.shape[0]

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / self.windows


class RowSample(Collector):
    """About `rows` tokens of the first batch, evenly spaced: float32 [<= rows, K]."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.kept: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if self.kept is None:
            flat = x.flatten(0, -2)
            self.kept = flat[:: max(1, len(flat) // self.rows)][: self.rows].float()

    def result(self) -> Tensor:
        assert self.kept is not None
        return self.kept


class Hessian(Collector):
    """The mean of x^T x over tokens: float64 [K, K]; the products of one batch are summed in float32.

    With `exact_in_bfloat16` the caller promises that x holds bfloat16 numbers, and a GPU multiplies them as such.
    """

    def __init__(self, exact_in_bfloat16: bool = False) -> None:
        self.exact_in_bfloat16 = exact_in_bfloat16
        self.total: Tensor | None = None
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        if x.is_cuda and self.exact_in_bfloat16:
            half = flat.to(torch.bfloat16)
            product = torch.mm(half.t(), half, out_dtype=torch.float32)
        else:
            product = flat.float().t() @ flat.float()
        self.total = product.double() if self.total is None else self.total.add_(product)
        self.tokens += len(flat)

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / self.tokens


COLLECTORS: dict[str, Callable[[int, int], Collector]] = {
    "peaks": PeakBlocks,
    "spaced": SpacedBlocks,
    "mean": lambda block, rows: MeanWindow(),
}
"""Name in `TransformMethod.needs` to a constructor from (block size, rows)."""
