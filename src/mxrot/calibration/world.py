"""The processes that share the calibration windows, and the reductions over what they have seen.

Every process runs the same code on its own windows, and calls the same reductions in the same order. A reduced value is
the same in all of them, so they branch the same way, or raise together. One process is the world `ONE`, in which
reducing changes nothing, copies nothing and waits for nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed

from mxrot.errors import DataError

T = TypeVar("T")

MOST_DIMENSIONS = 8
"""The most dimensions of an exchanged tensor."""
BUCKET_ELEMENTS = 1 << 24
"""Elements of small tensors that are summed together."""
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
"""In an order that is the same in all processes."""


class World(ABC):
    """Processes that share the calibration windows. None stands for a value of a process that has seen no data.

    DataError if no process has seen any.
    """

    rank: int
    """The rank of this process, from 0."""
    size: int
    """The number of processes."""
    device: torch.device | None = None
    """The device on which this process computes; None if the world does not define it."""

    @property
    def peers(self) -> World:
        """All processes that get the same results, whether or not they share windows."""
        return self

    @abstractmethod
    def sum(self, tensor: Tensor | None) -> Tensor:
        """The sum over all processes, in the type of `tensor`. Its order depends only on their number."""

    @abstractmethod
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, on this process's device. They have one type, and the same
        shapes in every process."""

    @abstractmethod
    def max(self, tensor: Tensor | None) -> Tensor:
        """The elementwise maximum over all processes of floating-point tensors; NaN if one is NaN."""

    @abstractmethod
    def gather(self, tensor: Tensor | None) -> list[Tensor]:
        """The tensors of all processes that have one, by rank. Their shapes may differ."""

    @abstractmethod
    def handed_to(self, rank: int, rows: Tensor, counts: Sequence[int]) -> list[Tensor] | None:
        """In process `rank`, the rows [n, K] of all processes, by rank, on its device; None in the others. All know how
        many rows each gives; width and type are the same."""

    @abstractmethod
    def meet(self) -> None:
        """Wait until all processes have reached this point."""

    def count(self, count: int) -> int:
        """The sum of a number over all processes."""
        return count if self.size == 1 else int(self.sum(torch.tensor([count])))

    def total(self, number: float) -> float:
        """The sum of a number over all processes, in float64."""
        return number if self.size == 1 else float(self.sum(torch.tensor([number], dtype=torch.float64)))

    def largest(self, count: int) -> int:
        """The largest value of a number over all processes."""
        return count if self.size == 1 else max(map(int, self.gather(torch.tensor([count]))))

    def hand_out(self, value: T) -> T:
        """The value of the first process. The values of the others are ignored."""
        return value

    def hand_out_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """`hand_out` for tensors by name, one after the other. The others get them on their own device."""
        names = self.hand_out(None if tensors is None else list(tensors))
        if names is None or self.size == 1:
            return tensors
        found = {}
        for name in names:
            tensor = self.hand_out(None if tensors is None else tensors[name])
            assert tensor is not None
            found[name] = tensor.to(self.device) if self.rank else tensor
        return found

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first process runs the body before the others, so that they find what it has fetched."""
        if self.rank:
            self.hand_out(None)
        yield
        if not self.rank:
            self.hand_out(None)

    def spread(self, tasks: Sequence[Callable[[], float]]) -> list[float]:
        """The results of tasks that any process could run. Every process runs some, and all get all results."""
        own = [task() for task in tasks[self.rank :: self.size]]
        found = [0.0] * len(tasks)
        for rank, given in enumerate(self.gather(torch.tensor(own, dtype=torch.float64))):
            found[rank :: self.size] = given.tolist()
        return found

    def before(self, count: int) -> int:
        """The sum of a number over the processes of lower rank."""
        return 0 if self.size == 1 else sum(map(int, self.gather(torch.tensor([count]))[: self.rank]))


class OneProcess(World):
    """A world of one process: every reduction is the identity."""

    rank, size = 0, 1

    def sum(self, tensor: Tensor | None) -> Tensor:
        """`tensor` itself."""
        return _there([tensor])[0]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def max(self, tensor: Tensor | None) -> Tensor:
        """`tensor` itself."""
        return _there([tensor])[0]

    def gather(self, tensor: Tensor | None) -> list[Tensor]:
        """`tensor` alone."""
        return _there([tensor])

    def handed_to(self, rank: int, rows: Tensor, counts: Sequence[int]) -> list[Tensor] | None:
        """`rows` alone."""
        return [rows]

    def meet(self) -> None:
        """There are no others to wait for."""


ONE = OneProcess()


class SideBySide(OneProcess):
    """Processes that all do the same with all windows, and with the bits of one process: nothing is reduced.

    Work that any of them could do, and data kept by the first one, go through their `peers`.
    """

    def __init__(self, peers: World) -> None:
        self._peers, self.device = peers, peers.device

    @property
    def peers(self) -> World:
        """The processes side by side."""
        return self._peers


class ProcessWorld(World):
    """The processes of the default group of torch.distributed: gloo on CPUs, NCCL on GPUs.

    `device` is where this process computes. The arguments of a reduction may lie elsewhere, and are not changed.
    """

    device: torch.device

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def sum(self, tensor: Tensor | None) -> Tensor:
        """The sum over all processes, on this process's device."""
        total = self._own(tensor, 0)
        distributed.all_reduce(total)
        return total

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Large tensors are summed in place. Small ones are joined in one buffer."""
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                distributed.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            distributed.all_reduce(flat)
            sums = flat.split([tensor.numel() for tensor in bucket])
            for tensor, total in zip(bucket, sums, strict=True):
                tensor.copy_(total.view_as(tensor))

    def max(self, tensor: Tensor | None) -> Tensor:
        """The maximum, on this process's device. NaNs are reduced separately, because backends may drop them."""
        own = self._own(tensor, -math.inf)
        both = torch.stack([own.nan_to_num(-math.inf, math.inf, -math.inf), own.isnan().to(own.dtype)])
        distributed.all_reduce(both, distributed.ReduceOp.MAX)
        return torch.where(both[1] > 0, math.nan, both[0])

    def gather(self, tensor: Tensor | None) -> list[Tensor]:
        """The tensors by rank, on this process's device. For the exchange all are padded to the longest."""
        shapes, dtype = self._shapes(tensor)
        sizes = [0 if shape is None else math.prod(shape) for shape in shapes]
        own = torch.zeros(max(sizes), dtype=dtype, device=self.device)
        if tensor is not None:
            own[: tensor.numel()] = tensor.flatten()
        found = [torch.empty_like(own) for _ in shapes]
        distributed.all_gather(found, own)
        return [
            flat[:size].view(shape) for flat, size, shape in zip(found, sizes, shapes, strict=True) if shape is not None
        ]

    def handed_to(self, rank: int, rows: Tensor, counts: Sequence[int]) -> list[Tensor] | None:
        """The rows of all in process `rank`. For the exchange all are padded to the largest number of rows."""
        own = torch.zeros(max(counts), rows.shape[1], dtype=rows.dtype, device=self.device)
        own[: len(rows)] = rows
        found = [torch.empty_like(own) for _ in counts] if rank == self.rank else None
        distributed.gather(own, found, dst=rank)
        return None if found is None else [padded[:count] for padded, count in zip(found, counts, strict=True)]

    def hand_out(self, value: T) -> T:
        """The value is pickled; tensors should be on the CPU."""
        given = [value if self.rank == 0 else None]
        distributed.broadcast_object_list(given, src=0)
        return cast(T, given[0])

    def meet(self) -> None:
        """Meet on the CPUs if there is a backend for them: one between GPUs takes memory there."""
        distributed.all_reduce(torch.zeros(1))

    def _own(self, tensor: Tensor | None, neutral: float) -> Tensor:
        """A copy of `tensor` on the device. Without one, a tensor of the neutral number in the others' shape."""
        shapes, dtype = self._shapes(tensor)
        if tensor is not None:
            return torch.empty(tensor.shape, dtype=dtype, device=self.device).copy_(tensor)
        return torch.full(_there(shapes)[0], neutral, dtype=dtype, device=self.device)

    def _shapes(self, tensor: Tensor | None) -> tuple[list[torch.Size | None], torch.dtype]:
        """The shape of every process's tensor, and their common type."""
        own = torch.full((2 + MOST_DIMENSIONS,), -1)
        if tensor is not None:
            own[: 2 + tensor.dim()] = torch.tensor([_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape])
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own)
        told: list[list[int] | None] = [None if one[0] < 0 else one for one in torch.stack(found).tolist()]
        shapes = [None if one is None else torch.Size(one[2 : 2 + one[1]]) for one in told]
        return shapes, _DTYPES[_there(told)[0][0]]


def _there(found: Sequence[T | None]) -> list[T]:
    """The values that are not None. DataError if all are."""
    there = [one for one in found if one is not None]
    if not there:
        raise DataError("a statistic of no tokens: calibration saw none here")
    return there


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in groups of at most BUCKET_ELEMENTS elements, but at least one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.numel() for one in bucket) + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
