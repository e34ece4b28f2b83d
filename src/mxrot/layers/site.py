"""Linears that read the same input, computed together.

The first one that is called transforms and quantizes the input once and multiplies it by the weights of all, which lie
in one tensor; the others take their part when they are called with the very same input, unchanged. Called in another
order, or with another input, each computes its own.

Each thread has products of its own. A tensor made under `torch.inference_mode` does not count its changes, so nobody
knows whether it was changed between two linears: there each computes its own (`torch.no_grad` keeps the saving).
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from mxrot.formats import TensorQuantizer
from mxrot.layers.product import Prepared, StoredWeight
from mxrot.layers.transform import InputTransform

PREPARED = ("row_exponents", "lifted_scales", "lifted", "swizzled", "whole_codes", "whole_scales")
"""Buffers of a linear that `prepare_site` fills."""


class _Products:
    """What was computed and not yet taken."""

    input: Tensor | None = None
    state: tuple[int, bool] | None = None
    """How often the input had been changed, and whether gradients were recorded."""
    waiting: tuple[Tensor, ...] = ()

    def forget(self) -> None:
        self.input, self.state, self.waiting = None, None, ()


class _ProductsOfThread(_Products, threading.local):
    """The same, for each thread."""


class SiteLinear(nn.Module):
    """A linear, as far as its site asks."""

    out_features: int
    weights: TensorQuantizer
    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    """Of formats that have a part of this name, as MXFP4 has."""
    bias: nn.Parameter | None
    row_exponents: Tensor | None
    lifted_scales: Tensor | None
    lifted: Tensor | None
    swizzled: Tensor | None
    whole_codes: Tensor | None
    whole_scales: Tensor | None
    keeps_lifted: bool | None
    """As the site was prepared, so that it can be again on another device; None where it was not."""
    site: SiteProducts[Any] | None

    @property
    @abstractmethod
    def transform(self) -> InputTransform | None:
        """What the linears of the site apply to their input."""

    @abstractmethod
    def stored_weight(self) -> StoredWeight:
        """Codes and their parts, without what was prepared."""

    @abstractmethod
    def compute(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        """The product with a weight in the format of this one."""

    @abstractmethod
    def forget(self) -> None:
        """Let go of what was prepared, here and in the other linears of the site."""


L = TypeVar("L", bound=SiteLinear)


class SiteProducts(Generic[L]):
    """The linears of a site, and the products that were computed but not yet taken."""

    def __init__(self, linears: Sequence[L]) -> None:
        self.linears = tuple(linears)
        self.forget()

    def forget(self) -> None:
        """Release products that no linear has taken."""
        self._of_threads = _ProductsOfThread()
        self._traced = _Products()
        """While a model is compiled, which settles who takes what once for all calls. A change in place between two
        linears of a site is not seen there."""

    def take(self, linear: L, x: Tensor) -> Tensor | None:
        """The product of `linear` with x; None where the site has not computed it."""
        if torch.compiler.is_compiling():
            products, state = self._traced, None
        elif x.is_inference():
            return None
        else:
            products, state = self._of_threads, (x._version, torch.is_grad_enabled())
        first = self.linears[0]
        if linear is first:
            if len(self.linears) == 1 or first.whole_codes is None or self._has_absent_bias():
                return None
            parts = self._compute(first, x)
            products.input, products.state, products.waiting = x, state, parts[1:]
            return parts[0]
        waiting = products.waiting
        if products.input is not x or linear is not self.linears[-len(waiting)] or products.state != state:
            return None
        products.waiting = waiting[1:]
        if len(waiting) == 1:
            products.input = None
        return waiting[0]

    def _compute(self, first: L, x: Tensor) -> tuple[Tensor, ...]:
        whole = first.compute(x, self.weight_of(first), self._bias())
        parts = whole.split([linear.out_features for linear in self.linears], dim=-1)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return parts
        # Not what `split` gives: each may be changed in place by one who records gradients.
        if not whole.requires_grad:
            return tuple(part.data for part in parts)
        ends = list(accumulate(linear.out_features for linear in self.linears))
        return tuple(whole[..., start:end] for start, end in zip([0, *ends], ends, strict=False))

    def weight_of(self, linear: L) -> StoredWeight:
        """The weight that is multiplied when `linear` is called: of the whole site where that was prepared."""
        first = self.linears[0]
        if first.whole_codes is None or first.whole_scales is None:
            own = linear.stored_weight()
            return StoredWeight(own.codes, own.parts, prepared_of(linear))
        return StoredWeight(first.whole_codes, (first.whole_scales,), prepared_of(first))

    def _has_absent_bias(self) -> bool:
        """Is a bias offloaded, to be brought when its own linear is called?"""
        return any(linear.bias is not None and linear.bias.is_meta for linear in self.linears)

    def _bias(self) -> Tensor | None:
        biases = [linear.bias for linear in self.linears]
        if all(bias is None for bias in biases):
            return None
        return torch.cat(
            [
                linear.weight_packed.new_zeros(linear.out_features, dtype=torch.float32)
                if bias is None
                else bias.float()
                for linear, bias in zip(self.linears, biases, strict=True)
            ]
        )

    def join(self) -> None:
        """Make the weights parts of the whole one again, after a copy that took them apart."""
        linears: tuple[L, ...] = vars(self).get("linears", ())
        if any("_parameters" not in vars(linear) for linear in linears):
            return  # the copy is not complete yet, and the last one calls again
        if linears and linears[0].whole_codes is not None and linears[0].whole_scales is not None:
            share_weights(linears, linears[0].whole_codes, linears[0].whole_scales)

    def __getstate__(self) -> dict[str, Any]:
        return {"linears": self.linears}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.linears = state["linears"]
        self.forget()


def share_weights(linears: Sequence[SiteLinear], codes: Tensor, scales: Tensor) -> None:
    """Let the parameters of the linears of a site be parts of its whole weight."""
    rows = [linear.out_features for linear in linears]
    for linear, own_codes, own_scales in zip(linears, codes.split(rows), scales.split(rows), strict=True):
        linear.weight_packed.data, linear.weight_scale.data = own_codes, own_scales


def lies_apart(linear: SiteLinear) -> bool:
    """Is the weight of a linear no longer a part of the whole one of its site?"""
    whole = None if linear.site is None else linear.site.linears[0].whole_codes
    if whole is None:
        return False
    return whole.untyped_storage().data_ptr() != linear.weight_packed.untyped_storage().data_ptr()


def prepared_of(linear: SiteLinear) -> Prepared:
    """What `prepare_site` has made and `linear` holds."""
    return Prepared(linear.row_exponents, linear.lifted_scales, linear.lifted, linear.swizzled)
