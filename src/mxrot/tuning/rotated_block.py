"""A decoder block in the basis of rotations that still move: the same modules, with weights that are computed from the
rotations in every forward pass.

With W the weights as the files hold them, R the rotation of the residual stream, G the gain of a norm and S the
rotation of the block's value heads, what reads a norm takes W G R, what writes to the stream R^T W, the value heads
S^T W and what reads them W S; then they are folded against the site's transform at run time, and rounded. Norms have
gains of 1. The gradients for R and S are those of these products, and pass rounding unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mxrot.models import Family, Site, value_heads, value_rows
from mxrot.surgery.fold_norms import gains_by_reader, gains_of_one, inner_readers
from mxrot.tuning.trained_sites import TrainedSite


class SharedInputs:
    """A forward pre-hook: the inputs of linears of one module as they are quantized, computed once for all of them."""

    def __init__(self, how: TrainedSite, readers: int) -> None:
        self._how, self._readers = how, readers
        self._last: tuple[Tensor, Tensor] | None = None
        self._left = 0

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        (x,) = arguments
        if self._last is None or self._last[0] is not x:
            self._last, self._left = (x, self._quantized(x)), self._readers
        found = self._last[1]
        self._left -= 1
        if not self._left:
            self.forget()
        return (found,)

    def _quantized(self, x: Tensor) -> Tensor:
        how = self._how
        with torch.autocast(x.device.type, enabled=False):
            if how.transform is not None:
                x = how.transform.apply(x)
            return x if how.inputs is None else how.inputs(x)

    def forget(self) -> None:
        """Let go of the last input and its graph."""
        self._last = None


@dataclass(frozen=True)
class RotatedBlock:
    """A decoder block, with linears of its own for each expert, that holds the weights of the files."""

    block: nn.Module
    family: Family
    own: Sequence[Site]
    """The sites that it has."""
    heads: tuple[int, int]
    """As of `value_heads`."""
    sites: Sequence[TrainedSite]
    """Those that are quantized."""
    dtype: torch.dtype = torch.float32
    """In which weights are rotated."""
    _inputs: list[SharedInputs] = field(default_factory=list)

    @staticmethod
    def of(
        block: nn.Module,
        family: Family,
        index: int,
        config: Any,
        sites: Sequence[TrainedSite],
        dtype: torch.dtype = torch.float32,
    ) -> RotatedBlock:
        return RotatedBlock(block, family, family.sites_of(index), value_heads(config), sites, dtype)

    @contextmanager
    def quantized_inputs(self) -> Iterator[None]:
        """While open, linears of quantized sites get quantized inputs."""
        with ExitStack() as stack:
            for how in self.sites:
                modules: dict[str, list[str]] = {}
                for linear in how.site.linears:
                    modules.setdefault(linear.rpartition(".")[0], []).append(linear)
                for linears in modules.values():  # those of two experts read other tokens
                    inputs = SharedInputs(how, len(linears))
                    self._inputs.append(inputs)
                    for linear in linears:
                        hook = self.block.get_submodule(linear).register_forward_pre_hook(inputs)
                        stack.callback(hook.remove)
            stack.callback(self._inputs.clear)
            yield

    def forward(
        self, hidden: Tensor, residual: Tensor | None, turn: Tensor | None, keywords: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """The states after the block, in the rotated basis as `hidden` [windows, tokens, H] are, and what it passes on
        beside them, or None; rotations as of `tensors`."""
        with torch.autocast(hidden.device.type, enabled=False):
            tensors = self.tensors(residual, turn)
        try:
            output: Any = functional_call(self.block, tensors, (hidden,), keywords)
        finally:  # computed once more for the gradients, it may stop before the last linear has run
            for inputs in self._inputs:
                inputs.forget()
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states, None if self.family.passes_on is None else output[1]

    def tensors(self, residual: Tensor | None, turn: Tensor | None) -> dict[str, Tensor]:
        """Every parameter of the block by its name, as it is under the rotations [H, H] of the stream and [D, D] of the
        value heads, None for none; those of quantized sites as they are rounded."""
        found = {name: tensor.detach().to(self.dtype) for name, tensor in self.block.named_parameters()}
        if turn is not None and any(self.family.values_read_by in site.linears for site in self.own):
            found |= self._turned(found, turn)
        if residual is not None:
            found |= self._rotated(found, residual)
        for how in self.sites:
            for name in (f"{linear}.weight" for linear in how.site.linears):
                weight = found[name] if how.transform is None else how.transform.fold(found[name]).to(self.dtype)
                found[name] = weight if how.weights is None else how.weights(weight)
        return found

    def _turned(self, tensors: Mapping[str, Tensor], turn: Tensor) -> dict[str, Tensor]:
        """What the value heads' rotation changes."""
        reader = f"{self.family.values_read_by}.weight"
        columns = tensors[reader].unflatten(-1, (-1, self.heads[1])) @ turn
        found = {reader: columns.flatten(-2)}
        for name in (f"{self.family.values}.weight", f"{self.family.values}.bias"):
            if name in tensors:
                found[name] = self._turned_rows(tensors[name], turn)
        return found

    def _turned_rows(self, tensor: Tensor, turn: Tensor) -> Tensor:
        """The rows of the value heads times the rotation; the others as they are."""
        own = value_rows(self.family, len(tensor), *self.heads).to(tensor.device)
        turned = turn.mT @ tensor[own].view(*own.shape, -1)
        return tensor.index_copy(0, own.flatten(), turned.reshape(own.numel(), *tensor.shape[1:]))

    def _rotated(self, tensors: Mapping[str, Tensor], residual: Tensor) -> dict[str, Tensor]:
        """What the rotation of the stream changes."""
        found: dict[str, Tensor] = gains_of_one(self.own, dict(tensors))
        inner = inner_readers(self.own)
        for name, gain in gains_by_reader(self.own, dict(tensors)).items():
            own = gain.to(self.dtype)
            found[name] = tensors[name] * own if name in inner else tensors[name] @ (own[:, None] * residual)
        for site in self.own:
            if not site.writes_residual:
                continue
            for name in (f"{linear}.{kind}" for linear in site.linears for kind in ("weight", "bias")):
                if name in tensors:  # a bias need not be there
                    found[name] = residual.mT @ found.get(name, tensors[name])
        return found
