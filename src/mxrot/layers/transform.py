"""The input transform that the linears of a site share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mxrot.layers.product import applied_matrices
from mxrot.transforms.stages import apply_matrices


class _Applied(NamedTuple):
    """The matrices that were made of a stored tensor, and how to know it again."""

    stored: Tensor
    """Holds its memory, so that no other tensor comes to lie there."""
    place: int
    version: int
    matrices: Tensor


class InputTransform(nn.Module):
    """Holds sqrt(B) T in bfloat16, as a checkpoint does, and applies T."""

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(stored, requires_grad=False)
        self._applied: _Applied | None = None
        self.is_for_kernels = False
        """Keep the matrices row by row on a GPU, which kernels would otherwise copy in every call."""
        self.prepared: Tensor | None
        """The bytes of `matrices()`, int16, for a compiled model; no part of a checkpoint, moves with the module."""
        keep(self, "prepared", None)

    def matrices(self) -> Tensor:
        """T as runtimes apply it, bfloat16 [1 | G, B, B]; kept until the stored tensor changes.

        A transform that is on the meta device is called instead: where weights are offloaded, hooks bring them for the
        time of a call.
        """
        weight = self.weight
        if weight.device.type == "meta":
            found: Tensor = self()
            return found
        if weight.is_inference():  # it does not count its changes
            return self._made()
        place, version, kept = weight.data_ptr(), weight._version, self._applied
        if kept is None or (kept.place, kept.version, kept.stored.device) != (place, version, weight.device):
            kept = self._applied = _Applied(weight.detach(), place, version, self._made())
        return kept.matrices

    @torch.no_grad()
    def _made(self) -> Tensor:
        applied = applied_matrices(self.weight)
        return applied.contiguous() if self.is_for_kernels and applied.is_cuda else applied

    @torch.no_grad()
    def prepare(self, is_for_kernels: bool = False) -> None:
        """Keep the matrices for a model that is compiled."""
        self.is_for_kernels, self._applied = is_for_kernels, None
        keep(self, "prepared", self.matrices().view(torch.int16))

    def forward(self, x: Tensor | None = None) -> Tensor:
        """x T in float32, blocks along the last dimension; without x, T."""
        if x is None:
            return self._made()
        return apply_matrices(x.to(torch.float32), self.matrices().to(torch.float32))

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._applied = None
        keep(self, "prepared", None)
        super()._load_from_state_dict(*arguments, **keywords)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputTransform:
        """For `model.to(...)`: the matrices move, and stay bfloat16."""
        self._applied = None
        super()._apply(keeping_type(fn), recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_applied": None}


def keeping_type(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`change` without the casts in it: what is stored as numbers of few bits means something else in another type."""

    def changed(tensor: Tensor) -> Tensor:
        found = change(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return changed


def keep(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Make `value` a buffer of a module that moves with it and is no part of a checkpoint.

    None is no such buffer, though its name is: who goes through all of them (accelerate) takes each for a tensor.
    """
    module.register_buffer(name, value, persistent=value is None)
