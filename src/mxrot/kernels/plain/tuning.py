"""Computations of tuning with weights and logits: the specification."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats.element import Element
from mxrot.transforms.stages import apply_matrices


@dataclass(frozen=True)
class WeightMoves:
    """The initial values of tunable weights [N, K], and what moves them besides their own offsets."""

    value: Tensor
    """The initial values, on the grid; bfloat16 [N, K]."""
    up: Tensor
    """The distance to the next larger grid value, 0 at the end of the grid; bfloat16 [N, K]."""
    down: Tensor
    """The distance to the next smaller grid value, bfloat16 [N, K]."""
    scales: Tensor
    """A power of two for each block of 32, float32 [N, K/32]."""
    follow: Tensor | None = None
    """The matrix with which a moving transform multiplies weights, float32 [1 | K/32, 32, 32]; None for no
    transform."""


@dataclass(frozen=True)
class WeightGradients:
    """Gradients of a loss, float32."""

    offset: Tensor
    """[N, K]."""
    follow: Tensor | None
    """The shape of `follow`, or None without it."""
    exponent: Tensor | None
    """The gradient for log2 of each scale, [N, K/32]; None if not requested."""


def plain_moved_weights(offset: Tensor, moves: WeightMoves, element: Element) -> Tensor:
    """Tunable weights for these offsets, float32 [N, K]: on the grid, bfloat16 [N, K].

    An offset is a move towards a neighbour, up or down by its sign, in units of the distance to it. The moved weight is
    multiplied by `follow`, and rounded on the grid of `scales`.
    """
    weight, _ = _continuous(offset, moves)
    scales = moves.scales.repeat_interleave(offset.shape[1] // moves.scales.shape[1], dim=1)
    return (element.round(_followed(weight, moves) / scales) * scales).to(torch.bfloat16)


def plain_moved_weights_gradients(
    gradient: Tensor, offset: Tensor, moves: WeightMoves, element: Element, wants_exponent: bool
) -> WeightGradients:
    """Gradients of what moves the weights, from the `gradient` [N, K] of the moved weights, as if nothing were rounded.

    The gradient of an exponent is that of LSQ (arXiv 1902.08153, section 2.1): ln 2 times the rounding error, or times
    the whole value if it was clipped.
    """
    weight, distance = _continuous(offset, moves)
    gradient = gradient.float()
    of_weight, of_follow, of_exponent = gradient, None, None
    if moves.follow is not None:
        size = moves.follow.shape[-1]
        of_weight = apply_matrices(gradient, moves.follow.mT)
        before, after = (x.unflatten(1, (-1, size)).transpose(0, 1) for x in (weight, gradient))
        of_follow = before.mT @ after
        if len(moves.follow) == 1:
            of_follow = of_follow.sum(dim=0, keepdim=True)
    if wants_exponent:
        scales = moves.scales.repeat_interleave(offset.shape[1] // moves.scales.shape[1], dim=1)
        followed = _followed(weight, moves)
        kept = torch.where((followed / scales).abs() > element.max, 0.0, followed)
        error = element.round(followed / scales) * scales - kept
        of_exponent = (gradient * error).unflatten(1, (moves.scales.shape[1], -1)).sum(dim=-1) * math.log(2)
    return WeightGradients(of_weight * distance, of_follow, of_exponent)


def _continuous(offset: Tensor, moves: WeightMoves) -> tuple[Tensor, Tensor]:
    """The weights before they follow the transform and are rounded, and the distances that are the units of offsets."""
    distance = torch.where(offset > 0, moves.up, moves.down).float()
    return moves.value.float() + offset * distance, distance


def _followed(weight: Tensor, moves: WeightMoves) -> Tensor:
    return weight if moves.follow is None else apply_matrices(weight, moves.follow)


def plain_divergence(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL(expected || found) in nats of each row of logits [M, V]: float32 [M], and its gradient for `found` [M, V]."""
    wanted, had = (torch.log_softmax(logits.float(), dim=-1) for logits in (expected, found))
    probabilities = wanted.exp()
    return (probabilities * (wanted - had)).sum(dim=-1), (had.exp() - probabilities).to(found.dtype)
