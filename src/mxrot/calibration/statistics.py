"""What calibration remembers of the inputs of a site, batch after batch.

Each collector sees batches [windows, tokens, K] and keeps something small on the same device. A transform
method asks for a collector by its name in COLLECTORS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from mxrot.kernels import block_moments, second_moment


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
        seen = torch.linalg.vector_norm(x.flatten(0, -2), ord=torch.inf, dim=0).float()
        self.maxima = seen if self.maxima is None else torch.maximum(self.maxima, seen)

    @property
    def has_seen(self) -> bool:
        """Is there a result?"""
        return self.maxima is not None

    def result(self) -> Tensor:
        assert self.maxima is not None
        return self.maxima


class PeakBlocks(Collector):
    """Of each block of channels, the tokens with the largest max |x|: float32 [G, rows, B], largest first."""

    def __init__(self, block: int, rows: int) -> None:
        self.block, self.rows = block, rows
        self.kept: Tensor | None = None

    def update(self, x: Tensor) -> None:
        top = self._largest(x.flatten(0, -2).unflatten(-1, (-1, self.block))).float()
        self.kept = top if self.kept is None else self._largest(torch.cat([self.kept, top], dim=1).transpose(0, 1))

    def _largest(self, blocks: Tensor) -> Tensor:
        """[tokens, G, B] to [G, <= rows, B]."""
        maxima = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=-1).t().contiguous()
        order = maxima.topk(min(self.rows, len(blocks)), dim=1).indices
        return blocks[order, torch.arange(len(order), device=order.device)[:, None]]

    def result(self) -> Tensor:
        assert self.kept is not None
        return self.kept


class SpacedBlocks(Collector):
    """About `rows` evenly spaced ones of `tokens` tokens, cut into blocks: float32 [G, rows, B]."""

    def __init__(self, block: int, rows: int, tokens: int) -> None:
        self.block, self.stride = block, max(1, tokens // rows)
        self.seen = 0
        self.kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        taken = flat[-self.seen % self.stride :: self.stride].float()
        self.kept.append(taken.unflatten(-1, (-1, self.block)).transpose(0, 1))
        self.seen += len(flat)

    def result(self) -> Tensor:
        return torch.cat(self.kept, dim=1)


class LargestMagnitude(Collector):
    """max |x| over everything: float32 scalar; NaN where a NaN was seen. Nothing waits for the device until asked."""

    def __init__(self) -> None:
        self.maxima: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.maxima.append(torch.linalg.vector_norm(x.flatten(), ord=torch.inf).float())

    def result(self) -> Tensor:
        return torch.stack(self.maxima).amax()


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


class BlockMoments(Collector):
    """The mean of x_g^T x_g over tokens: float64 [G, B, B]; the products of one batch are summed in float32."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.total: Tensor | None = None
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        product = block_moments(flat, self.block)
        self.total = product if self.total is None else self.total + product
        self.tokens += len(flat)

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / self.tokens


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
    """The mean of x^T x over tokens: float64 [K, K]; the products of one batch are summed in float32."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def update(self, x: Tensor, size: Tensor | None = None) -> None:
        """With `size` [windows, tokens, 1] each token is multiplied by it first."""
        flat = x.flatten(0, -2)
        product = second_moment(flat, flat, None if size is None else size.flatten(0, -2))
        self.total = product if self.total is None else self.total.add_(product)
        self.tokens += len(flat)

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / self.tokens


COLLECTORS: dict[str, Callable[[int, int, int], Collector]] = {
    "peaks": lambda block, rows, tokens: PeakBlocks(block, rows),
    "spaced": SpacedBlocks,
    "moments": lambda block, rows, tokens: BlockMoments(block),
    "mean": lambda block, rows, tokens: MeanWindow(),
}
"""Name in `TransformMethod.needs` to a constructor from (block size, rows, tokens that will be seen)."""
