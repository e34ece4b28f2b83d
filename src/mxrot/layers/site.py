"""Linears that read the same input, computed together.

The first one that is called transforms and quantizes the input once and multiplies it by the weights of all, which lie
in one tensor; the others take their part when they are called with the very same input. Called in another order, or
with another input, each computes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mxrot.layers.product import StoredWeight

if TYPE_CHECKING:
    from mxrot.layers.linear import QuantLinear


class SiteProducts:
    """The linears of a site, and the products that were computed but not yet taken."""

    def __init__(self, linears: Sequence[QuantLinear]) -> None:
        self.linears = tuple(linears)
        self._input: Tensor | None = None
        self._waiting: list[Tensor] = []

    def take(self, linear: QuantLinear, x: Tensor) -> Tensor | None:
        """The product of `linear` with x; None where the site has not computed it."""
        first = self.linears[0]
        if linear is first:
            if len(self.linears) == 1 or first.whole_codes is None:
                return None
            whole = first.compute(x, self.weight_of(first), self._bias())
            parts = whole.split([part.out_features for part in self.linears], dim=-1)
            self._input, self._waiting = x, list(parts[1:])
            return parts[0]
        if self._input is not x or linear is not self.linears[-len(self._waiting)]:
            return None
        found = self._waiting.pop(0)
        if not self._waiting:
            self._input = None
        return found

    def weight_of(self, linear: QuantLinear) -> StoredWeight:
        """The weight that is multiplied when `linear` is called: of the whole site where that was prepared."""
        first = self.linears[0]
        if first.whole_codes is None or first.whole_scales is None:
            return prepared_weight(linear, linear.weight_packed, linear.weight_scale)
        return prepared_weight(first, first.whole_codes, first.whole_scales)

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


def prepared_weight(linear: QuantLinear, codes: Tensor, scales: Tensor) -> StoredWeight:
    """These codes and scales with what was prepared of them, which `linear` holds."""
    return StoredWeight(
        codes,
        scales,
        linear.weight_tensor_scale,
        linear.weight_zero_point,
        linear.row_exponents,
        linear.lifted_scales,
        linear.lifted,
        linear.swizzled,
    )
