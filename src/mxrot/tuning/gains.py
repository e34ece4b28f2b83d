"""Gains of norms while they are learned: relative to what they were, rounded in every pass to what is stored.

A gain that is multiplied by 1 + c has c as its parameter, so that one learning rate fits large and small ones; where a
norm multiplies by 1 + its weight, it is the whole that is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mxrot.tuning.straight_through import PassThrough


class LearnedVector(nn.Module):
    """A vector x = x_0 + u c with c learned from 0 on, as its type holds it."""

    def __init__(self, start: Tensor, unit: Tensor, dtype: torch.dtype) -> None:
        """`start` x_0 and `unit` u, both float32 [K]; `dtype` is that of a checkpoint."""
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
    """The gain of a norm, which has the learned one in the place of its weight."""

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
        """Before a pass, in its graph."""
        self._norm[0].weight = self.vector.value()

    def settle(self) -> None:
        """After the parameter has changed: no graph kept."""
        self._norm[0].weight = self.vector.start

    @torch.no_grad()
    def finish(self) -> None:
        """Give the norm what was learned as its weight."""
        (norm,) = self._norm
        del norm.weight
        norm.weight = nn.Parameter(self.vector.value(), requires_grad=False)


def learned_gains(
    module: nn.Module, prefix: str, adds_one: bool, rounding_type: Callable[[str], torch.dtype]
) -> list[LearnedGain]:
    """Those of all norms in a module, or of the module itself, whose full name is `prefix`.

    `rounding_type` gives the type of a tensor by its full name; `adds_one`: these norms multiply by 1 + their weight.
    """
    found = []
    for name, one in list(module.named_modules(prefix=prefix)):
        weight = getattr(one, "weight", None)
        if name.endswith("norm") and isinstance(weight, nn.Parameter) and weight.dim() == 1:
            found.append(LearnedGain(one, adds_one, rounding_type(f"{name}.weight")))
    return found


def _as_stored(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype).to(x.dtype)
