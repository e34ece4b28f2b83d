"""Gains of norms while they are learned: relative to their start, and rounded in every pass to the stored type.

A gain multiplied by 1 + c has c as its parameter, so that one learning rate fits large and small gains. If a norm
multiplies by 1 + its weight, the whole factor is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mxrot.tuning.straight_through import PassThrough


class LearnedVector(nn.Module):
    """A vector x = x_0 + u c in its stored type, with c learned from 0 on."""

    def __init__(self, start: Tensor, unit: Tensor, dtype: torch.dtype) -> None:
        """`start` x_0 and `unit` u, both float32 [K]; `dtype` is the type in a checkpoint."""
        super().__init__()
        self.start: Tensor
        self.unit: Tensor
        self.register_buffer("start", start.detach().clone(), persistent=False)
        self.register_buffer("unit", unit.detach().clone(), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.start))
        self.dtype = dtype

    def value(self) -> Tensor:
        """float32 [K], with the gradient as if nothing were rounded."""
        found: Tensor = PassThrough.apply(self.start + self.unit * self.change, partial(_as_stored, self.dtype))
        return found


class LearnedGain(nn.Module):
    """The gain of a norm, whose weight is replaced by the learned one."""

    def __init__(self, norm: nn.Module, adds_one: bool, dtype: torch.dtype) -> None:
        super().__init__()
        weight = norm.weight
        assert isinstance(weight, nn.Parameter)
        start = weight.detach().float()
        self.vector = LearnedVector(start, (start + 1 if adds_one else start).abs(), dtype)
        self._norm = (norm,)  # in a tuple, so that it is not registered here
        del norm.weight
        norm.weight = start

    def begin(self) -> None:
        """Called before a pass, within its graph."""
        self._norm[0].weight = self.vector.value()

    def settle(self) -> None:
        """Called after the parameter has changed: free the graph."""
        self._norm[0].weight = self.vector.start

    @torch.no_grad()
    def finish(self) -> None:
        """Set the learned gain as the norm's weight."""
        (norm,) = self._norm
        del norm.weight
        norm.weight = nn.Parameter(self.vector.value(), requires_grad=False)


def learned_gains(
    module: nn.Module, prefix: str, adds_one: bool, rounding_type: Callable[[str], torch.dtype]
) -> list[LearnedGain]:
    """The gains of all norms in a module, or of the module itself, whose full name is `prefix`.

    `rounding_type` gives the type of a tensor by its full name. `adds_one`: these norms multiply by 1 + their weight.
    """
    found = []
    for name, one in list(module.named_modules(prefix=prefix)):
        weight = getattr(one, "weight", None)
        if name.endswith("norm") and isinstance(weight, nn.Parameter) and weight.dim() == 1:
            found.append(LearnedGain(one, adds_one, rounding_type(f"{name}.weight")))
    return found


def _as_stored(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype).to(x.dtype)
