"""The head as a quantized linear.

The whole head is read for each token, and it has as many rows as the vocabulary. If its inputs stay in 16 bits, the
product of inputs and codes is exact, up to the order of sums. A kernel reads the codes directly if it can
(`kernels.coded_weights`); otherwise they are dequantized piece by piece. With quantized inputs the head is an ordinary
`QuantLinear`.

While torch.compile traces a model, and while gradients are recorded, the product is one operation of the library
`mxrot`. Its gradient is that of x W_q^T + b, for x and b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxrot.formats import get_format
from mxrot.kernels import Choice
from mxrot.kernels.coded_weights import choose_coded, coded_product
from mxrot.kernels.fixed_rows import in_fixed_rows
from mxrot.kernels.plain.coded_weights import BLOCK, CodedWeight
from mxrot.layers.linear import QuantLinear
from mxrot.layers.product import StoredWeight, matrices_of
from mxrot.transforms.stages import apply_matrices


class HeadLinear(QuantLinear):
    """Logits of hidden states: x W_q^T + b without quantized inputs, Q(x T) W_q^T + b with them."""

    def compute(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of `x`. Sums are in float32, rounded once.

        If inputs are not quantized, x T is computed in float32 and rounded to the type of `x` first.
        """
        if self.activations is not None:
            return super().compute(x, weight, bias)
        x, format = self._led(x), self.weights.format.name
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            stored, applied = self._traced_transform(x.device)
            found: Tensor = _head_product(x, stored, applied, weight.codes, weight.parts[0], bias, format)
            return found
        return _product(x, self._matrices(x.device), weight.codes, weight.parts[0], bias, format)

    def choose_path(self, rows: int) -> Choice:
        """The way to compute it for `rows` rows of bfloat16 input, and why."""
        if self.activations is not None:
            return super().choose_path(rows)
        weight = CodedWeight(self.weight_packed, self.weight_scale, self.weights.format)
        return choose_coded(rows, weight, torch.bfloat16, self.weight_packed.device)


def _product(
    x: Tensor, matrices: Tensor | None, codes: Tensor, scales: Tensor, bias: Tensor | None, format: str
) -> Tensor:
    weight = CodedWeight(codes, scales, get_format(format))
    with torch.autocast(x.device.type, enabled=False):
        if matrices is not None:
            T = matrices.to(torch.float32)
            x = in_fixed_rows(lambda part: apply_matrices(part.to(torch.float32), T), x).to(x.dtype)
        if bias is None:
            return coded_product(x, weight, x.dtype)
        return (coded_product(x, weight, torch.float32) + bias.to(torch.float32)).to(x.dtype)


@torch.library.custom_op("mxrot::head_product", mutates_args=())
def _head_product(
    x: Tensor,
    stored: Tensor | None,
    applied: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    format: str,
) -> Tensor:
    return _product(x, matrices_of(stored, applied), codes, scales, bias, format)


@_head_product.register_fake
def _head_shape(x: Tensor, stored: Tensor | None, applied: Tensor | None, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("mxrot::head_gradient", mutates_args=())
def _head_gradient(
    gradient: Tensor, stored: Tensor | None, applied: Tensor | None, codes: Tensor, scales: Tensor, format: str
) -> Tensor:
    """The gradient (dy W_q) T^T in float32, [..., K], of dy [..., N]."""
    values = CodedWeight(codes, scales, get_format(format)).dequantized()
    with torch.autocast(gradient.device.type, enabled=False):
        found = gradient.to(torch.float32) @ values
        matrices = matrices_of(stored, applied)
        return found if matrices is None else apply_matrices(found, matrices.to(torch.float32).mT)


@_head_gradient.register_fake
def _head_gradient_shape(
    gradient: Tensor, stored: Tensor | None, applied: Tensor | None, codes: Tensor, scales: Tensor, format: str
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], BLOCK * scales.shape[1], dtype=torch.float32)


_X, _BIAS = 0, 5
"""Positions of the arguments of `_head_product` that have gradients."""


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, stored, applied, codes, scales, bias, ctx.format = inputs
    ctx.save_for_backward(stored, applied, codes, scales)
    ctx.type, ctx.bias_type = x.dtype, None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * 7
    if ctx.needs_input_grad[_X]:
        found[_X] = _head_gradient(gradient.contiguous(), *ctx.saved_tensors, ctx.format).to(ctx.type)
    if ctx.needs_input_grad[_BIAS]:
        found[_BIAS] = gradient.reshape(-1, gradient.shape[-1]).float().sum(dim=0).to(ctx.bias_type)
    return tuple(found)


_head_product.register_autograd(_gradients, setup_context=_keep_for_gradient)
