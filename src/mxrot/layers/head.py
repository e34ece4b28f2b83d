"""The head as a quantized linear.

It is read whole for each token and has as many rows as the vocabulary. Where its inputs stay in 16 bits, products are
exact in what inputs and codes hold, up to the order of their sums: codes are read as they are where a kernel does that
(`kernels.coded_weights`), and else written out piece by piece. With quantized inputs it is a `QuantLinear` like others.

While torch.compile traces a model, and where gradients are recorded, the product is one operation of the library
`mxrot`; its gradient is that of x W_q^T + b, for x and b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mxrot.formats import TensorQuantizer
from mxrot.kernels import Choice
from mxrot.kernels.coded_weights import choose_coded, coded_product
from mxrot.kernels.plain.coded_weights import CodedWeight
from mxrot.layers.linear import QuantLinear
from mxrot.layers.product import StoredWeight


class HeadLinear(QuantLinear):
    """Logits of hidden states: x W_q^T + b without quantized inputs, Q(x T) W_q^T + b with them."""

    def compute(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of `x`; sums in float32, rounded once."""
        if self.activations is not None:
            return super().compute(x, weight, bias)
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            found: Tensor = _head_product(x, weight.codes, weight.parts[0], bias, self.weights.format.name)
            return found
        return _product(x, weight.codes, weight.parts[0], bias, self.weights.format.name)

    def choose_path(self, rows: int) -> Choice:
        """What computes it for so many rows of bfloat16 input, and why."""
        if self.activations is not None:
            return super().choose_path(rows)
        weight = CodedWeight(self.weight_packed, self.weight_scale, self.weights.format)
        return choose_coded(rows, weight, torch.bfloat16, self.weight_packed.device)


def _product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format: str) -> Tensor:
    weight = CodedWeight(codes, scales, TensorQuantizer.of(format).format)
    with torch.autocast(x.device.type, enabled=False):
        if bias is None:
            return coded_product(x, weight, x.dtype)
        return (coded_product(x, weight, torch.float32) + bias.to(torch.float32)).to(x.dtype)


@torch.library.custom_op("mxrot::head_product", mutates_args=())
def _head_product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format: str) -> Tensor:
    return _product(x, codes, scales, bias, format)


@_head_product.register_fake
def _head_shape(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("mxrot::head_gradient", mutates_args=())
def _head_gradient(gradient: Tensor, codes: Tensor, scales: Tensor, format: str) -> Tensor:
    """dy W_q in float32: [..., K] of dy [..., N]."""
    values = CodedWeight(codes, scales, TensorQuantizer.of(format).format).dequantized()
    with torch.autocast(gradient.device.type, enabled=False):
        return gradient.to(torch.float32) @ values


@_head_gradient.register_fake
def _head_gradient_shape(gradient: Tensor, codes: Tensor, scales: Tensor, format: str) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], 32 * scales.shape[1], dtype=torch.float32)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, bias, ctx.format = inputs
    ctx.save_for_backward(codes, scales)
    ctx.type, ctx.bias_type = x.dtype, None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> Sequence[Tensor | None]:
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = _head_gradient(gradient.contiguous(), *ctx.saved_tensors, ctx.format).to(ctx.type)
    if ctx.needs_input_grad[3]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).float().sum(dim=0).to(ctx.bias_type)
    return of_x, None, None, of_bias, None


_head_product.register_autograd(_gradients, setup_context=_keep_for_gradient)
