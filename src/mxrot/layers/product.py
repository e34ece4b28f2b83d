"""The function that a quantized linear computes, on tensors.

The plain path is the definition that faster kernels must reproduce: the transform in float32, the activation quantizer
on its float32 result, then the product of the quantized input with the dequantized weights. If both operands are exact
in bfloat16, the product runs on bfloat16 matrix hardware with a float32 result, otherwise in float32.

While torch.compile traces a model, the function is one opaque operation of the library `mxrot`. The kernel is chosen
when the operation runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxrot.formats import QTensor, TensorQuantizer
from mxrot.kernels import (
    Inputs,
    LookUpWeight,
    PackedWeight,
    look_up_linear,
    multiply,
    multiply_by_mxfp4,
    quantized_linear,
    rotate_quantize,
)
from mxrot.kernels.fixed_rows import in_fixed_rows
from mxrot.transforms.stages import STORED_DTYPE, BlockDiagonal, apply_matrices


class Prepared(NamedTuple):
    """What was computed once from an MXFP4 weight, as in `PackedWeight`, in types that no cast of a module changes."""

    row_exponents: Tensor | None = None
    lifted_scales: Tensor | None = None
    """The bits of float32 numbers, as int32."""
    lifted: Tensor | None = None
    """The bytes of E4M3 numbers, uint8 [N, K]."""
    swizzled: Tensor | None = None


NOTHING_PREPARED = Prepared()


@dataclass(frozen=True)
class StoredWeight:
    """A weight [N, K] as a checkpoint holds it, and what was prepared from it."""

    codes: Tensor
    """Packed, uint8 [N, K * bits / 8]."""
    parts: tuple[Tensor, ...]
    """The parts, in the order of `TensorQuantizer.part_names`."""
    prepared: Prepared = NOTHING_PREPARED

    def packed(self) -> PackedWeight:
        """The weight in the form that kernels take, for MXFP4."""
        exponents, powers, lifted, swizzled = self.prepared
        lifted = None if lifted is None else lifted.view(torch.float8_e4m3fn)
        powers = None if powers is None else powers.view(torch.float32)
        return PackedWeight(self.codes, self.parts[0], exponents, powers, lifted, swizzled)

    def looked_up(self) -> LookUpWeight:
        """The weight in the form that kernels take, for look-up formats."""
        return LookUpWeight(self.codes, *self.parts)

    def dequantized(self, quantizer: TensorQuantizer) -> Tensor:
        """W_q in float32, [N, K]."""
        return QTensor.dequantize_packed(self.codes, quantizer.as_parts(self.parts), quantizer.format)


def product(
    x: Tensor,
    matrices: Tensor | None,
    weight: StoredWeight,
    bias: Tensor | None,
    weights: TensorQuantizer,
    activations: TensorQuantizer | None,
    fast: bool = False,
) -> Tensor:
    """Q(x T) W_q^T + b, [..., K] to [..., N], in the dtype of `x`. Sums are in float32. With `fast`, an FP8 product
    sums in fewer bits. Autocast has no effect."""
    if _is_autocast(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return product(x, matrices, weight, bias, weights, activations, fast)
    found = None
    if activations is not None and weights.is_mxfp4 and activations.is_mxfp4:
        inputs = Inputs(x, matrices, activations.format, activations.rule, fast)
        found = quantized_linear(inputs, weight.packed())
    elif activations is not None and weights.looks_up:
        inputs = Inputs(x, matrices, activations.format, activations.rule)
        found = look_up_linear(inputs, weight.looked_up())
    if found is None:
        found = _plain_product(quantized_input(x, matrices, activations), weight, weights, activations)
    if bias is not None:
        found = found + bias.to(torch.float32)
    return found.to(x.dtype)


def _plain_product(
    inputs: Tensor, weight: StoredWeight, weights: TensorQuantizer, activations: TensorQuantizer | None
) -> Tensor:
    """Quantized inputs times the dequantized weights: float32 [..., N]."""
    is_exact = activations is not None and weights.is_exact_in_bfloat16 and activations.is_exact_in_bfloat16
    if weights.is_mxfp4:
        return multiply_by_mxfp4(inputs, weight.codes, weight.parts[0], is_exact)
    return multiply(inputs, weight.dequantized(weights), is_exact)


def quantized_input(x: Tensor, matrices: Tensor | None, activations: TensorQuantizer | None) -> Tensor:
    """Q(x T), in the shape of `x`. The type is float32, or bfloat16 if that is exact."""
    if activations is not None:
        return rotate_quantize(x, matrices, activations.format, activations.rule)
    x = x.to(torch.float32)
    if matrices is None:
        return x
    applied = matrices.to(torch.float32)
    return in_fixed_rows(lambda part: apply_matrices(part, applied), x)


def applied_matrices(stored: Tensor) -> Tensor:
    """T as runtimes apply it, bfloat16 [1 | G, B, B], from the stored tensor of a checkpoint."""
    return BlockDiagonal.from_stored(stored).matrices.to(STORED_DTYPE)


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
    """`product` for torch.compile and for gradients. `stored` is the transform of a checkpoint, and `applied` the bytes
    of its matrices (int16) if they are available.

    The gradient passes the rounding of the inputs unchanged (straight-through; rounding itself has a zero gradient
    almost everywhere). It is the gradient of (x T) W_q^T + b, for x and b. If inputs are not quantized, it is exact.
    """
    result: Tensor = _product(
        x,
        stored,
        applied,
        weight.codes,
        list(weight.parts),
        list(weight.prepared),
        bias,
        weights.spelled,
        "" if activations is None else activations.spelled,
        fast,
    )
    return result


@torch.library.custom_op("mxrot::product", mutates_args=())
def _product(
    x: Tensor,
    stored: Tensor | None,
    applied: Tensor | None,
    codes: Tensor,
    parts: Sequence[Tensor],
    prepared: Sequence[Tensor | None],
    bias: Tensor | None,
    weights: str,
    activations: str,
    fast: bool,
) -> Tensor:
    weight = StoredWeight(codes, tuple(parts), Prepared(*prepared))
    quantizer = TensorQuantizer.named(activations) if activations else None
    if quantizer is not None:
        quantizer = TensorQuantizer(quantizer.format, quantizer.rule.for_rows())
    return product(x, matrices_of(stored, applied), weight, bias, TensorQuantizer.named(weights), quantizer, fast)


def matrices_of(stored: Tensor | None, applied: Tensor | None) -> Tensor | None:
    """T as runtimes apply it, from the stored tensor of a checkpoint, or from its bytes if they are available."""
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
    parts: Sequence[Tensor],
    weights: str,
) -> Tensor:
    """The gradient (dy W_q) T^T in float32, [..., K], of dy [..., N]."""
    W = StoredWeight(codes, tuple(parts)).dequantized(TensorQuantizer.named(weights))
    with torch.autocast(gradient.device.type, enabled=False):
        found = gradient.to(torch.float32) @ W
        matrices = matrices_of(stored, applied)
        return found if matrices is None else apply_matrices(found, matrices.to(torch.float32).mT)


@_product_gradient.register_fake
def _product_gradient_shape(
    gradient: Tensor,
    stored: Tensor | None,
    applied: Tensor | None,
    codes: Tensor,
    parts: Sequence[Tensor],
    weights: str,
) -> Tensor:
    columns = codes.shape[1] * 8 // TensorQuantizer.named(weights).format.bits
    return gradient.new_empty(*gradient.shape[:-1], columns, dtype=torch.float32)


_X, _BIAS = 0, 6
"""Positions of the arguments of `_product` that have gradients."""


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, stored, applied, codes, parts, _, bias, ctx.weights, *_ = inputs
    ctx.save_for_backward(stored, applied, codes, *parts)
    ctx.type, ctx.bias_type = x.dtype, None if bias is None else bias.dtype
    # torch requires a list for a list of tensors, and None for anything else.
    ctx.nothing = [[None] * len(value) if _are_tensors(value) else None for value in inputs]


def _are_tensors(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Tensor) for item in value)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    found = list(ctx.nothing)
    if ctx.needs_input_grad[_X]:
        stored, applied, codes, *parts = ctx.saved_tensors
        found[_X] = _product_gradient(gradient.contiguous(), stored, applied, codes, parts, ctx.weights).to(ctx.type)
    if ctx.needs_input_grad[_BIAS]:
        found[_BIAS] = gradient.reshape(-1, gradient.shape[-1]).float().sum(dim=0).to(ctx.bias_type)
    return tuple(found)


_product.register_autograd(_gradients, setup_context=_keep_for_gradient)


@cache
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _is_autocast(device_type: str) -> bool:
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)
