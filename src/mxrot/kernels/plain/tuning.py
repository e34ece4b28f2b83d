"""What tuning computes with weights and logits: the specification."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats.element import Element
from mxrot.transforms.stages import apply_matrices


@dataclass(frozen=True)
class WeightMoves:
    """Where tunable weights [N, K] start, and what moves them besides their own offsets."""

    value: Tensor
    """Their values at the start, on the grid; bfloat16 [N, K]."""
    up: Tensor
    """Distance to the next larger value of the grid, 0 at its end; bfloat16 [N, K]."""
    down: Tensor
    """Distance to the next smaller one."""
    scales: Tensor
    """A power of two for each block of 32, float32 [N, K/32]."""
    follow: Tensor | None = None
    """What a moving transform multiplies weights with, float32 [1 | K/32, 32, 32]; None for nothing."""


@dataclass(frozen=True)
class WeightGradients:
    """Gradients of a loss, float32."""

    offset: Tensor
    """[N, K]."""
    follow: Tensor | None
    """The shape of `follow`; None where there is none."""
    exponent: Tensor | None
    """For the binary logarithm of each scale, [N, K/32]; None if not asked for."""


def plain_moved_weights(offset: Tensor, moves: WeightMoves, element: Element) -> Tensor:
    """Tunable weights as they are for these offsets float32 [N, K]: on the grid, bfloat16 [N, K].

    An offset is the way to a neighbour, up or down by its sign, in units of its distance. Where it leads the weight
    is multiplied by `follow`, and rounded on the grid of `scales`.
    """
    weight, _ = _continuous(offset, moves)
    scales = moves.scales.repeat_interleave(offset.shape[1] // moves.scales.shape[1], dim=1)
    return (element.round(_followed(weight, moves) / scales) * scales).to(torch.bfloat16)


def plain_moved_weights_gradients(
    gradient: Tensor, offset: Tensor, moves: WeightMoves, element: Element, wants_exponent: bool
) -> WeightGradients:
    """Gradients of what moves the weights, from the `gradient` [N, K] of the moved ones, as if nothing were rounded.

    That of an exponent is the one of LSQ (arXiv 1902.08153, section 2.1): ln 2 times what rounding added, or the
    whole value where it was cut off.
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
    """The weights that are rounded, before they follow the transform, and the distances that offsets count in."""
    distance = torch.where(offset > 0, moves.up, moves.down).float()
    return moves.value.float() + offset * distance, distance


def _followed(weight: Tensor, moves: WeightMoves) -> Tensor:
    return weight if moves.follow is None else apply_matrices(weight, moves.follow)


def plain_divergence(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL(expected || found) in nats of each row of logits [M, V]: float32 [M], and its gradient for `found` [M, V]."""
    wanted, had = (torch.log_softmax(logits.float(), dim=-1) for logits in (expected, found))
    probabilities = wanted.exp()
    return (probabilities * (wanted - had)).sum(dim=-1), (had.exp() - probabilities).to(found.dtype)
