"""Where what is kept between two passes lies, and how much of it may be kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
class Placement:
    """Where hidden states and submodules' outputs lie between passes."""

    device: torch.device
    """Where blocks compute."""
    is_on_host: bool = False
    """In host memory, instead of on the device?"""

    @staticmethod
    def of_states(device: torch.device, size: int) -> Placement:
        """Of blocks with so many bytes of states between two of them."""
        return Placement(device, size > MOST_ON_DEVICE.get(device.type, math.inf))

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
