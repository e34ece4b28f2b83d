"""Linears that read the same input, computed together.

The first linear that is called transforms and quantizes the input once, and multiplies it by the weights of all linears
of the site, which are in one tensor. The others take their part when they are called with the same unchanged input
tensor. If the order or the input differs, each linear computes its own product.

Each thread has its own products. A tensor made under `torch.inference_mode` does not count its changes, so a change
between two linears could not be detected. Each linear then computes its own product (`torch.no_grad` keeps the saving).
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
    """Products that were computed and not yet taken."""

    input: Tensor | None = None
    state: tuple[int, bool] | None = None
    """How often the input had been changed, and whether gradients were recorded."""
    waiting: tuple[Tensor, ...] = ()

    def forget(self) -> None:
        self.input, self.state, self.waiting = None, None, ()


class _ProductsOfThread(_Products, threading.local):
    """The products of one thread."""


class SiteLinear(nn.Module):
    """The interface of a linear that its site uses."""

    out_features: int
    weights: TensorQuantizer
    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    """The scales, for formats that have a part of this name, such as MXFP4."""
    bias: nn.Parameter | None
    row_exponents: Tensor | None
    lifted_scales: Tensor | None
    lifted: Tensor | None
    swizzled: Tensor | None
    whole_codes: Tensor | None
    whole_scales: Tensor | None
    keeps_lifted: bool | None
    """How the site was prepared, in order to repeat it on another device. None if it was not prepared."""
    site: SiteProducts[Any] | None

    @property
    @abstractmethod
    def transform(self) -> InputTransform | None:
        """The transform that the linears of the site apply to their input."""

    @abstractmethod
    def stored_weight(self) -> StoredWeight:
        """The codes and their parts, without what was prepared."""

    @abstractmethod
    def compute(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        """The product with a weight in the format of this linear."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what was prepared, here and in the other linears of the site."""


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
        """The products while a model is compiled. The compiler decides once for all calls who takes which product. It
        does not notice an in-place change of the input between two linears of a site."""

    def take(self, linear: L, x: Tensor) -> Tensor | None:
        """The product of `linear` with x. None if the site has not computed it."""
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
        # Not the views of `split`: with gradients, each part may be changed in place.
        if not whole.requires_grad:
            return tuple(part.data for part in parts)
        ends = list(accumulate(linear.out_features for linear in self.linears))
        return tuple(whole[..., start:end] for start, end in zip([0, *ends], ends, strict=False))

    def weight_of(self, linear: L) -> StoredWeight:
        """The weight that is multiplied when `linear` is called. It is that of the whole site if that was prepared."""
        first = self.linears[0]
        if first.whole_codes is None or first.whole_scales is None:
            own = linear.stored_weight()
            return StoredWeight(own.codes, own.parts, prepared_of(linear))
        return StoredWeight(first.whole_codes, (first.whole_scales,), prepared_of(first))

    def _has_absent_bias(self) -> bool:
        """True if a bias is offloaded, and is loaded only when its own linear is called."""
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
        """Make the weights views of the whole weight again, after a copy has separated them."""
        linears: tuple[L, ...] = vars(self).get("linears", ())
        if any("_parameters" not in vars(linear) for linear in linears):
            return  # the copy is not complete yet, and its last linear calls again
        if linears and linears[0].whole_codes is not None and linears[0].whole_scales is not None:
            share_weights(linears, linears[0].whole_codes, linears[0].whole_scales)

    def __getstate__(self) -> dict[str, Any]:
        return {"linears": self.linears}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.linears = state["linears"]
        self.forget()


def share_weights(linears: Sequence[SiteLinear], codes: Tensor, scales: Tensor) -> None:
    """Make the parameters of the linears of a site views of its whole weight."""
    rows = [linear.out_features for linear in linears]
    for linear, own_codes, own_scales in zip(linears, codes.split(rows), scales.split(rows), strict=True):
        linear.weight_packed.data, linear.weight_scale.data = own_codes, own_scales


def lies_apart(linear: SiteLinear) -> bool:
    """True if the weight of a linear is no longer a view of the whole weight of its site."""
    whole = None if linear.site is None else linear.site.linears[0].whole_codes
    if whole is None:
        return False
    return whole.untyped_storage().data_ptr() != linear.weight_packed.untyped_storage().data_ptr()


def prepared_of(linear: SiteLinear) -> Prepared:
    """The tensors of `prepare_site` that `linear` holds."""
    return Prepared(linear.row_exponents, linear.lifted_scales, linear.lifted, linear.swizzled)
