"""What a quantized linear computes, as one function of tensors.

The plain path is the definition that faster kernels must reproduce: the transform in float32, the activation
quantizer on its float32 result, then the product of the quantized input with the dequantized weights.
Where both operands are exact in bfloat16 the product runs on bfloat16 matrix hardware with a float32 result,
otherwise in float32.

While torch.compile traces a model, the function is one operation of the library `mxrot` that it does not look into:
which kernel runs is decided when it runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.formats import BlockScales, Format, QTensor, ScaleRule, fake_quantize, get_format
from mxrot.kernels import Inputs, PackedWeight, multiply, multiply_by_mxfp4, quantized_linear, rotate_quantize
from mxrot.transforms.base import STORED_DTYPE, BlockTransform, apply_matrices


@dataclass(frozen=True)
class TensorQuantizer:
    """A format and the rule that picks its scales."""

    format: Format
    rule: ScaleRule

    def __call__(self, x: Tensor) -> Tensor:
        """What the quantized tensor stands for, float32."""
        return fake_quantize(x, self.format, self.rule)

    @property
    def is_exact_in_bfloat16(self) -> bool:
        """Is every quantized value a bfloat16 number?"""
        return self.format.grid.is_exact_in_bfloat16(self.rule)

    @property
    def is_mxfp4(self) -> bool:
        return self.format.name == "mxfp4" and self.rule.is_power_of_two

    @property
    def looks_at_whole_tensor(self) -> bool:
        """Does what a block becomes depend on blocks of other rows?"""
        return self.format.grid.looks_at_whole_tensor(self.rule)

    def stored_parts(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor of a weight [out_features, in_features], by its name in a checkpoint.

        ConfigError if the row is not whole blocks.
        """
        format = self.format
        block = format.block_in(in_features)
        if in_features % block:
            raise ConfigError(
                f"rows of {in_features} elements are not a multiple of the block size {block} of {format.name}"
            )
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        found["weight_packed"] = (out_features, in_features * format.bits // 8), torch.uint8
        for part in format.grid.parts(self.rule):
            found[f"weight_{part.name}"] = part.shape_of(out_features, in_features // block), part.dtype
        return found

    def stored_bytes(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Bytes of the codes of such a weight, and of what stands beside them."""
        codes, *parts = (
            math.prod(shape) * dtype.itemsize for shape, dtype in self.stored_parts(out_features, in_features).values()
        )
        return codes, sum(parts)

    def scales(self, stored: Tensor, tensor_scale: Tensor | None, zero_points: Tensor | None) -> BlockScales:
        """Scales as a checkpoint holds them."""
        return BlockScales(stored, self.rule.stored_type(self.format.scale), tensor_scale, zero_points)


@dataclass(frozen=True)
class StoredWeight:
    """A weight [N, K] as a checkpoint holds it, and what was prepared of it."""

    codes: Tensor
    """Packed, uint8 [N, K * bits / 8]."""
    scales: Tensor
    """[N, K / block]."""
    tensor_scale: Tensor | None = None
    zero_points: Tensor | None = None
    row_exponents: Tensor | None = None
    lifted_scales: Tensor | None = None
    """The bits of float32 numbers, int32."""
    lifted: Tensor | None = None
    """The bytes of E4M3 numbers, uint8 [N, K]."""
    swizzled: Tensor | None = None
    """The last four as in `PackedWeight`."""

    def packed(self) -> PackedWeight:
        """As the kernels take it; for MXFP4."""
        lifted = None if self.lifted is None else self.lifted.view(torch.float8_e4m3fn)
        powers = None if self.lifted_scales is None else self.lifted_scales.view(torch.float32)
        return PackedWeight(self.codes, self.scales, self.row_exponents, powers, lifted, self.swizzled)


def product(
    x: Tensor,
    matrices: Tensor | None,
    weight: StoredWeight,
    bias: Tensor | None,
    weights: TensorQuantizer,
    activations: TensorQuantizer | None,
    fast: bool = False,
) -> Tensor:
    """Q(x T) W_q^T + b, [..., K] to [..., N], in the dtype of `x`; sums in float32, with `fast` in less where an FP8
    product runs; autocast changes nothing of it."""
    if _is_autocast(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return product(x, matrices, weight, bias, weights, activations, fast)
    found = None
    if activations is not None and weights.is_mxfp4 and activations.is_mxfp4:
        inputs = Inputs(x, matrices, activations.format, activations.rule, fast)
        found = quantized_linear(inputs, weight.packed())
    if found is None:
        found = _plain_product(quantized_input(x, matrices, activations), weight, weights, activations)
    if bias is not None:
        found = found + bias.to(torch.float32)
    return found.to(x.dtype)


def _plain_product(
    inputs: Tensor, weight: StoredWeight, weights: TensorQuantizer, activations: TensorQuantizer | None
) -> Tensor:
    """Quantized inputs times the weights, which are written out: float32 [..., N]."""
    is_exact = activations is not None and weights.is_exact_in_bfloat16 and activations.is_exact_in_bfloat16
    if weights.is_mxfp4:
        return multiply_by_mxfp4(inputs, weight.codes, weight.scales, is_exact)
    scales = weights.scales(weight.scales, weight.tensor_scale, weight.zero_points)
    return multiply(inputs, QTensor.dequantize_packed(weight.codes, scales, weights.format), is_exact)


def quantized_input(x: Tensor, matrices: Tensor | None, activations: TensorQuantizer | None) -> Tensor:
    """Q(x T), the shape of `x`; float32, or bfloat16 where that holds it exactly."""
    if activations is not None:
        return rotate_quantize(x, matrices, activations.format, activations.rule)
    x = x.to(torch.float32)
    return x if matrices is None else apply_matrices(x, matrices.to(torch.float32))


def applied_matrices(stored: Tensor) -> Tensor:
    """T as runtimes apply it, bfloat16 [1 | G, B, B], from what a checkpoint holds."""
    return BlockTransform.from_stored(stored).matrices.to(STORED_DTYPE)


def traced_product(
    x: Tensor,
    stored: Tensor | None,
    applied: Tensor | None,
    weight: StoredWeight,
    bias: Tensor | None,
    weights: TensorQuantizer,
    activations: TensorQuantizer | None,
    fast: bool = False,
) -> Tensor:
    """`product` for torch.compile and for gradients. `stored` is the transform of a checkpoint, `applied` the bytes of
    its matrices (int16) where they are at hand.

    The gradient passes the rounding of the inputs unchanged (straight-through; rounding itself has the gradient zero
    almost everywhere): it is that of (x T) W_q^T + b, for x and b. Where inputs are not quantized it is the exact one.
    """
    result: Tensor = _product(
        x,
        stored,
        applied,
        weight.codes,
        weight.scales,
        weight.tensor_scale,
        weight.zero_points,
        weight.row_exponents,
        weight.lifted_scales,
        weight.lifted,
        weight.swizzled,
        bias,
        _name(weights),
        "" if activations is None else _name(activations),
        fast,
    )
    return result


@torch.library.custom_op("mxrot::product", mutates_args=())
def _product(
    x: Tensor,
    stored: Tensor | None,
    applied: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    zero_points: Tensor | None,
    row_exponents: Tensor | None,
    lifted_scales: Tensor | None,
    lifted: Tensor | None,
    swizzled: Tensor | None,
    bias: Tensor | None,
    weights: str,
    activations: str,
    fast: bool,
) -> Tensor:
    weight = StoredWeight(codes, scales, tensor_scale, zero_points, row_exponents, lifted_scales, lifted, swizzled)
    quantizer = _quantizer(activations) if activations else None
    if quantizer is not None:
        quantizer = TensorQuantizer(quantizer.format, quantizer.rule.for_rows())
    return product(x, _applied(stored, applied), weight, bias, _quantizer(weights), quantizer, fast)


def _applied(stored: Tensor | None, applied: Tensor | None) -> Tensor | None:
    if stored is None:
        return None
    return applied_matrices(stored) if applied is None else applied.view(STORED_DTYPE)


@_product.register_fake
def _product_shape(x: Tensor, stored: Tensor | None, applied: Tensor | None, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("mxrot::product_gradient", mutates_args=())
def _product_gradient(
    gradient: Tensor,
    stored: Tensor | None,
    applied: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    zero_points: Tensor | None,
    weights: str,
) -> Tensor:
    """(dy W_q) T^T in float32: [..., K] of dy [..., N]."""
    quantizer = _quantizer(weights)
    W = QTensor.dequantize_packed(codes, quantizer.scales(scales, tensor_scale, zero_points), quantizer.format)
    with torch.autocast(gradient.device.type, enabled=False):
        found = gradient.to(torch.float32) @ W
        matrices = _applied(stored, applied)
        return found if matrices is None else apply_matrices(found, matrices.to(torch.float32).mT)


@_product_gradient.register_fake
def _product_gradient_shape(
    gradient: Tensor, stored: Tensor | None, applied: Tensor | None, codes: Tensor, scales: Tensor, *rest: Any
) -> Tensor:
    columns = codes.shape[1] * 8 // _quantizer(rest[-1]).format.element.bits
    return gradient.new_empty(*gradient.shape[:-1], columns, dtype=torch.float32)


_X, _STORED, _ZERO_POINTS, _BIAS, _WEIGHTS = 0, 1, 6, 11, 12
"""Positions of arguments of `_product`."""
_ARGUMENTS = 15


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[_STORED : _ZERO_POINTS + 1])
    ctx.weights, ctx.type = inputs[_WEIGHTS], inputs[_X].dtype
    ctx.bias_type = None if inputs[_BIAS] is None else inputs[_BIAS].dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * _ARGUMENTS
    if ctx.needs_input_grad[_X]:
        found[_X] = _product_gradient(gradient.contiguous(), *ctx.saved_tensors, ctx.weights).to(ctx.type)
    if ctx.needs_input_grad[_BIAS]:
        found[_BIAS] = gradient.reshape(-1, gradient.shape[-1]).float().sum(dim=0).to(ctx.bias_type)
    return tuple(found)


_product.register_autograd(_gradients, setup_context=_keep_for_gradient)


@cache
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _is_autocast(device_type: str) -> bool:
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def _name(quantizer: TensorQuantizer) -> str:
    return f"{quantizer.format.name} {quantizer.rule.name}"


def _quantizer(name: str) -> TensorQuantizer:
    format_name, rule = name.split(" ")
    format = get_format(format_name)
    return TensorQuantizer(format, format.rule(rule))
