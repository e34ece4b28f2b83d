"""Rounding with a gradient: forward as in a deployed model, backward as if nothing had been rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxrot.formats import TensorQuantizer
from mxrot.formats.element import Element
from mxrot.kernels import WeightMoves, divergence, moved_weights, moved_weights_gradients, rotate_quantize
from mxrot.transforms.stages import STORED_DTYPE


class PassThrough(torch.autograd.Function):
    """A rounding function of x; the gradient is that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounds: Callable[[Tensor], Tensor]) -> Tensor:
        """In the shape of `x`, and the type that `rounds` returns."""
        ctx.dtype = x.dtype
        return rounds(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


class RotateQuantize(torch.autograd.Function):
    """Q(x T); the gradient is that of x T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, quantizer: TensorQuantizer) -> Tensor:
        """`x` [..., K], `matrices` float32 [1 | G, B, B] of bfloat16 numbers. Returns the values of the codes."""
        ctx.save_for_backward(x, matrices)
        with torch.autocast(x.device.type, enabled=False):
            return rotate_quantize(x, matrices.to(STORED_DTYPE), quantizer.format, quantizer.rule)

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


class MoveWeights(torch.autograd.Function):
    """Weights moved by their offsets, a moving transform and moving exponents, rounded to their grid again.

    The gradients are those of `mxrot.kernels.plain_moved_weights_gradients`.
    """

    @staticmethod
    def forward(
        ctx: Any, offset: Tensor, follow: Tensor | None, exponent: Tensor | None, start: WeightMoves, element: Element
    ) -> Tensor:
        """bfloat16 [N, K]. `exponent`, float32 [N, K/32], is relative to the scales of `start`, and is rounded."""
        scales = start.scales if exponent is None else start.scales * torch.exp2(exponent.round())
        ctx.moves, ctx.element = replace(start, scales=scales, follow=follow), element
        ctx.save_for_backward(offset)
        return moved_weights(offset, ctx.moves, element)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (offset,) = ctx.saved_tensors
        found = moved_weights_gradients(gradient, offset, ctx.moves, ctx.element, ctx.needs_input_grad[2])
        return found.offset, found.follow, found.exponent, None, None


class Divergence(torch.autograd.Function):
    """The mean over rows of KL(expected || found), for logits [M, V]."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, expected: Tensor) -> Tensor:
        losses, gradient = divergence(expected, found)
        ctx.save_for_backward(gradient)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (of_rows,) = ctx.saved_tensors
        return of_rows * (gradient / len(of_rows)).to(of_rows.dtype), None


class WeightedDivergence(torch.autograd.Function):
    """The mean over rows of b KL(found || expected) + (1 - b) KL(expected || found), for logits [M, V]; in float32."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, expected: Tensor, reverse: float) -> Tensor:
        """`reverse` is b."""
        with torch.autocast(found.device.type, enabled=False):
            own, other = found.float().log_softmax(dim=-1), expected.float().log_softmax(dim=-1)
            probable, wanted = own.exp(), other.exp()
            own = own.sub_(other)  # the logarithm of their ratio
            backward = (probable * own).sum(dim=-1, keepdim=True)
            forward = -(wanted * own).sum(dim=-1, keepdim=True)
            # d KL(found || expected) = p (log(p / q) - KL), d KL(expected || found) = p - q
            gradient = own.sub_(backward).mul_(reverse).add_(1 - reverse).mul_(probable)
            gradient = gradient.sub_(wanted, alpha=1 - reverse)
            ctx.save_for_backward(gradient.to(found.dtype))
            return (reverse * backward + (1 - reverse) * forward).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (of_rows,) = ctx.saved_tensors
        return of_rows * (gradient / len(of_rows)).to(of_rows.dtype), None, None


class InverseTransposed(torch.autograd.Function):
    """R^-T, from an inverse that was computed before, with the gradient for R."""

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
