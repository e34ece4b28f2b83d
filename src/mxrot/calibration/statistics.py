"""Statistics of the inputs of a site, collected batch after batch.

Each collector sees batches [windows, tokens, K] and keeps something small on the same device. Its base class says how
the results of several processes are combined: `Summed`, `Maximum` or `Gathered`. A transform method asks for a
collector by its name in COLLECTORS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from mxrot.calibration.world import ONE, World
from mxrot.kernels import block_moments, second_moment


class Statistic(ABC):
    """Accumulates one statistic."""

    @abstractmethod
    def result(self, world: World = ONE) -> Tensor:
        """The statistic over all batches so far, of all processes of `world`. All must call this; all get the same
        result.

        DataError if no process has seen any batch.
        """


class Collector(Statistic):
    """A statistic of the inputs of one site."""

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Add one batch [windows, tokens, K] of any floating-point dtype."""


class Summed(Statistic):
    """A mean: the sums and the counts of all processes."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self.count = 0
        """The number of windows or tokens that this process has seen."""

    def _add(self, total: Tensor, count: int) -> None:
        """Keep `total`, or add it to the kept sum."""
        self._total = total if self._total is None else self._total.add_(total)
        self.count += count

    def result(self, world: World = ONE) -> Tensor:
        """The mean, in the type of the sums."""
        return world.sum(self._total) / world.count(self.count)


class Maximum(Statistic):
    """The maximum over all processes; NaN if one of them is."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    def _take(self, found: Tensor) -> None:
        self._largest = found if self._largest is None else torch.maximum(self._largest, found)

    @property
    def has_seen(self) -> bool:
        """True if this process has seen a batch."""
        return self._largest is not None

    def result(self, world: World = ONE) -> Tensor:
        """The maxima."""
        return world.max(self._largest)


class Gathered(Statistic):
    """Some of the tokens, joined from all processes in rank order."""

    @abstractmethod
    def _own(self) -> Tensor | None:
        """The tokens of this process; None if it has seen nothing."""

    @abstractmethod
    def _together(self, parts: list[Tensor]) -> Tensor:
        """The tokens of several processes, reduced to as many as one process with all of them would keep."""

    def result(self, world: World = ONE) -> Tensor:
        """The tokens."""
        parts = world.gather(self._own())
        return parts[0] if len(parts) == 1 else self._together(parts)


class ChannelMaxima(Maximum, Collector):
    """max |x| of each channel: float32 [K]. NaN if a NaN was seen."""

    def update(self, x: Tensor) -> None:
        self._take(torch.linalg.vector_norm(x.flatten(0, -2), ord=torch.inf, dim=0).float())


class ChannelSquares(Summed, Collector):
    """The mean of x^2 of each channel: float64 [K]; the squares of one batch are summed in float32."""

    def update(self, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        self._add(torch.linalg.vector_norm(flat, dim=0, dtype=torch.float32).double().square(), len(flat))


class LargestMagnitude(Maximum, Collector):
    """max |x| over everything: float32 scalar; NaN if a NaN was seen. Nothing waits for the device until the result."""

    def update(self, x: Tensor) -> None:
        self._take(torch.linalg.vector_norm(x.flatten(), ord=torch.inf).float())


class PeakBlocks(Gathered, Collector):
    """For each block of channels, the tokens with the largest max |x|: float32 [G, rows, B], largest first."""

    def __init__(self, block: int, rows: int) -> None:
        self.block, self.rows = block, rows
        self._kept: Tensor | None = None

    def update(self, x: Tensor) -> None:
        top = self._largest(x.flatten(0, -2).unflatten(-1, (-1, self.block))).float()
        self._kept = top if self._kept is None else self._together([self._kept, top])

    def _largest(self, blocks: Tensor) -> Tensor:
        """[tokens, G, B] to [G, <= rows, B]."""
        maxima = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=-1).t().contiguous()
        order = maxima.topk(min(self.rows, len(blocks)), dim=1).indices
        return blocks[order, torch.arange(len(order), device=order.device)[:, None]]

    def _own(self) -> Tensor | None:
        return self._kept

    def _together(self, parts: list[Tensor]) -> Tensor:
        return self._largest(torch.cat(parts, dim=1).transpose(0, 1))


class SpacedBlocks(Gathered, Collector):
    """About `rows` evenly spaced tokens out of `tokens`, in blocks: float32 [G, rows, B].

    `tokens` counts those of all processes; `before` of them precede the first of this process.
    """

    def __init__(self, block: int, rows: int, tokens: int, before: int = 0) -> None:
        self.block, self.stride = block, max(1, tokens // rows)
        self._seen = before
        self._kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        taken = flat[-self._seen % self.stride :: self.stride].float()
        self._kept.append(taken.unflatten(-1, (-1, self.block)).transpose(0, 1))
        self._seen += len(flat)

    def _own(self) -> Tensor | None:
        return torch.cat(self._kept, dim=1) if self._kept else None

    def _together(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1)


class RowSample(Gathered, Collector):
    """About `rows` tokens of the first batch, evenly spaced: float32 [<= rows, K].

    With several processes, it is the first batch of the lowest rank that has one.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._kept: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if self._kept is None:
            flat = x.flatten(0, -2)
            self._kept = flat[:: max(1, len(flat) // self.rows)][: self.rows].float()

    def _own(self) -> Tensor | None:
        return self._kept

    def _together(self, parts: list[Tensor]) -> Tensor:
        return parts[0]


class MeanWindow(Summed, Collector):
    """The mean over windows, token by token: float32 [tokens, K]."""

    def update(self, x: Tensor) -> None:
        self._add(x.float().sum(dim=0), x.shape[0])


class BlockMoments(Summed, Collector):
    """The mean of x_g^T x_g over tokens: float64 [G, B, B]; the products of one batch are summed in float32."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def update(self, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        self._add(block_moments(flat, self.block), len(flat))


class Hessian(Summed, Collector):
    """The mean of x^T x over tokens: float64 [K, K]; the products of one batch are summed in float32."""

    def update(self, x: Tensor, size: Tensor | None = None) -> None:
        """With `size` [windows, tokens, 1] each token is multiplied by it first."""
        flat = x.flatten(0, -2)
        self._add(second_moment(flat, flat, None if size is None else size.flatten(0, -2)), len(flat))


class CrossMoment(Summed):
    """The mean of d^T x over tokens: float64 [N, K]; the products of one batch are summed in float32."""

    def update(self, d: Tensor, x: Tensor, size: Tensor | None = None) -> None:
        """Add one batch, d [windows, tokens, N] and x [windows, tokens, K].

        With `size` [windows, tokens, 1] both are multiplied by it first.
        """
        flat = x.flatten(0, -2)
        self._add(second_moment(d.flatten(0, -2), flat, None if size is None else size.flatten(0, -2)), len(flat))


COLLECTORS: dict[str, Callable[..., Collector]] = {
    "peaks": lambda block, rows, tokens, before=0: PeakBlocks(block, rows),
    "spaced": SpacedBlocks,
    "moments": lambda block, rows, tokens, before=0: BlockMoments(block),
    "mean": lambda block, rows, tokens, before=0: MeanWindow(),
    "whole": lambda block, rows, tokens, before=0: Hessian(),
}
"""From a name in `TransformMethod.needs` to a constructor. Its arguments are the block size, rows, the tokens that all
processes will see, and how many of these come before this process's own (default 0)."""
