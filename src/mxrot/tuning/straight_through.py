"""Rounding with a gradient: forward what a deployed model computes, backward as if nothing had been rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxrot.kernels import rotate_quantize
from mxrot.layers import TensorQuantizer


class RotateQuantize(torch.autograd.Function):
    """Q(x T); the gradient is that of x T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, quantizer: TensorQuantizer) -> Tensor:
        """`x` [..., K], `matrices` float32 [1 | G, B, B]; the values that the codes stand for."""
        ctx.save_for_backward(x, matrices)
        with torch.autocast(x.device.type, enabled=False):
            return rotate_quantize(x, matrices, quantizer.format, quantizer.rule)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, matrices = ctx.saved_tensors
        size = matrices.shape[-1]
        blocks = gradient.flatten(0, -2).unflatten(-1, (-1, size)).transpose(0, 1)
        of_x = (blocks @ matrices.mT.to(blocks.dtype)).transpose(0, 1).reshape(x.shape).to(x.dtype)
        if not ctx.needs_input_grad[1]:
            return of_x, None, None
        inputs = x.flatten(0, -2).unflatten(-1, (-1, size)).transpose(0, 1).to(blocks.dtype)
        of_matrices = (inputs.mT @ blocks).float()
        if len(matrices) == 1:
            of_matrices = of_matrices.sum(dim=0, keepdim=True)
        return of_x, of_matrices, None


class StepTo(torch.autograd.Function):
    """The value of each weight after a step to a neighbouring code, or none.

    offset > 1/2 takes the next larger code, offset < -1/2 the next smaller one. The gradient is that of
    value + offset * (distance to the neighbour on that side).
    """

    @staticmethod
    def forward(ctx: Any, offset: Tensor, value: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """All [N, K]: `value` is where a weight starts, `up` and `down` the distances, not negative."""
        ctx.save_for_backward(offset, up, down)
        # Not value + step: a value of -0 stays one.
        return torch.where(offset > 0.5, value + up, torch.where(offset < -0.5, value - down, value))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        offset, up, down = ctx.saved_tensors
        return gradient * torch.where(offset > 0, up, down), None, None, None


class InverseTransposed(torch.autograd.Function):
    """R^-T, from an inverse that was computed before; with the gradient for R."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, inverse: Tensor) -> Tensor:
        """`matrices` R and `inverse` R^-1, both [G, B, B]."""
        ctx.save_for_backward(inverse)
        return inverse.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        # d(R^-T) = -R^-T dR^T R^-T
        return -(inverse.mT @ gradient.mT @ inverse.mT), None


class RoundToStored(torch.autograd.Function):
    """sqrt(B) T through bfloat16 and back, as a checkpoint keeps T; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        root = matrices.shape[-1] ** 0.5
        stored = (matrices * root).to(torch.bfloat16)
        return (stored.float() / root).to(torch.bfloat16).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
