"""Quantized inputs of sites with straight-through gradients, while other modules replace their linears for training."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mxrot.formats import TensorQuantizer
from mxrot.layers import InputTransform
from mxrot.tuning.moving_transform import MovingTransform
from mxrot.tuning.straight_through import PassThrough, RotateQuantize


class StraightInputs(nn.Module):
    """The quantized inputs of a site, computed once for all its linears, with straight-through gradients."""

    def __init__(
        self,
        transform: InputTransform | None,
        quantizer: TensorQuantizer,
        readers: int,
        moving: MovingTransform | None = None,
    ) -> None:
        """With `moving`, the matrices of `transform` are taken from it."""
        super().__init__()
        self.quantizer, self.readers, self.moving = quantizer, readers, moving
        self._transform = (transform,)  # in a tuple, so that it is not registered here
        self._last: tuple[Tensor, Tensor] | None = None
        self._reads_left = 0

    def forward(self, x: Tensor) -> Tensor:
        """Q(x T): bfloat16 on a GPU, like the products there; else float32."""
        if self._last is None or self._last[0] is not x:
            self._last, self._reads_left = (x, self._quantized(x)), self.readers
        _, quantized = self._last
        self._reads_left -= 1
        if not self._reads_left:
            self.forget()
        return quantized

    def _quantized(self, x: Tensor) -> Tensor:
        transform = self._transform[0]
        led = x if transform is None else transform.lead(x)
        with torch.autocast(x.device.type, enabled=False):
            if transform is not None and transform.has_matrices:
                matrices = transform.matrices().float() if self.moving is None else self.moving.matrices()
                found: Tensor = RotateQuantize.apply(led, matrices, self.quantizer)
                return found.to(product_type(x.device))
            found = PassThrough.apply(led, partial(_rounded_for_product, self.quantizer))
            return found

    def forget(self) -> None:
        """Free the last input and its graph."""
        self._last = None


def product_type(device: torch.device) -> torch.dtype:
    """The type in which inputs and weights are multiplied while they are learned."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _rounded_for_product(quantizer: TensorQuantizer, x: Tensor) -> Tensor:
    return quantizer(x).to(product_type(x.device))
