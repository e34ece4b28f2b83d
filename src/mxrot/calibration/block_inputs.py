"""What decoder blocks are called with, and what of it is kept from pass to pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.calibration.world import ONE, World

CPU = torch.device("cpu")
MOST_REMEMBERED = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes of a norm's outputs, and of a site's inputs, that are kept for a later pass; the rest is computed anew."""
MOST_ON_DEVICE = {"cuda": 1 << 30}
"""Bytes of the states between two blocks that stay on the device between passes, and submodules' outputs with them.
Above, host memory keeps both: the copies take less time than what is computed with them, by far."""


def may_remember(kept: int, tensors: Iterable[Tensor]) -> bool:
    """Is there room for these beside the bytes that are kept?"""
    added = list(tensors)
    bound = MOST_REMEMBERED.get(added[0].device.type, MOST_REMEMBERED["cpu"])
    return kept + sum(tensor.nbytes for tensor in added) <= bound


@dataclass(frozen=True)
class Ending:
    """The last step of a submodule on one batch: a linear, whose output it passes on, perhaps with None behind it."""

    x: Tensor
    """What goes into the linear."""
    others: tuple[None, ...] | None
    """What follows in the tuple that the submodule gives, as far as it is read; None where it gives no tuple."""

    def output(self, linear: nn.Module) -> Any:
        """What the submodule gives with this linear in that place."""
        return linear(self.x) if self.others is None else (linear(self.x), *self.others)


@dataclass
class BlockInputs:
    """What a decoder block is called with: hidden states batch by batch, and the same keyword arguments with each."""

    hidden: list[Tensor]
    """[windows, tokens, hidden_size] each, as `put` keeps them."""
    arguments: Sequence[dict[str, Any]]
    """The keyword arguments of each decoder block, as of `block_arguments`."""
    block: int = 0
    """Which of the decoder blocks it is."""
    known: dict[str, dict[int, Any]] = field(default_factory=dict)
    """Submodules of the block that will not change any more, with their outputs by batch, as far as they have run.
    A later pass takes them from here."""
    readers: dict[str, frozenset[str]] = field(default_factory=dict)
    """Which submodules read the output of a norm, and nothing else does. It is remembered, too, as long as one of
    them has to run."""
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """By batch, inputs of modules that the next pass will ask for again."""
    last_linear: str | None = None
    """The linear that a submodule is expected to end with."""
    endings: dict[int, Ending] = field(default_factory=dict)
    """By batch, where it does."""
    device: torch.device = CPU
    """Where the block computes."""
    is_on_host: bool = False
    """Do hidden states and submodules' outputs lie in host memory between passes?"""
    world: World = ONE
    """The processes that the calibration windows are spread over; the hidden states are those of this one."""

    def another(self) -> BlockInputs:
        """The same for a block of another model, before anything has run."""
        return BlockInputs(
            list(self.hidden),
            self.arguments,
            self.block,
            device=self.device,
            is_on_host=self.is_on_host,
            world=self.world,
        )

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of this block."""
        return self.arguments[self.block]

    def put(self, value: Any) -> Any:
        """A tensor, or the tensors of a tuple, as they are kept between passes; on the host only `get` may read them,
        because the copy may be on its way."""
        if isinstance(value, tuple):
            return tuple(self.put(part) for part in value)
        if not self.is_on_host or not isinstance(value, Tensor):
            return value
        kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=torch.cuda.is_available())
        return kept.copy_(value, non_blocking=True)

    def get(self, value: Any) -> Any:
        """What `put` was given."""
        if isinstance(value, tuple):
            return tuple(self.get(part) for part in value)
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

    @property
    def windows(self) -> int:
        return sum(len(batch) for batch in self.hidden)

    @property
    def tokens(self) -> int:
        """Tokens of all windows together, of all processes, which ask together."""
        return self.world.count(self._own_tokens)

    @property
    def tokens_before(self) -> int:
        """Those of processes of lower rank."""
        return self.world.before(self._own_tokens)

    @property
    def _own_tokens(self) -> int:
        return sum(batch.shape[0] * batch.shape[1] for batch in self.hidden)


def bytes_kept(inputs: BlockInputs) -> int:
    return sum(x.nbytes for batch in inputs.kept.values() for x in batch.values())
