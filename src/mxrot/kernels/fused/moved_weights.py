"""Weights that tuning moves, and the gradients of what moves them, with one kernel for each direction (Triton).

`plain_moved_weights` and `plain_moved_weights_gradients` are the specification. Sums of products have a different order
here, so a weight next to a rounding boundary may fall on the other side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.formats.element import FloatElement
from mxrot.kernels.fused.arithmetic import inverse_power_of_two, round_to_element
from mxrot.kernels.plain import WeightGradients, WeightMoves

BLOCK = tl.constexpr(32)
ROWS = 64


@triton.jit
def _continuous(offset_pointer, value_pointer, up_pointer, down_pointer, place, mask):
    """The weights before they follow the transform and are rounded, and the distances that are the units of offsets."""
    offset = tl.load(offset_pointer + place, mask=mask, other=0.0)
    value = tl.load(value_pointer + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_pointer + place, mask=mask, other=0.0).to(tl.float32)
    down = tl.load(down_pointer + place, mask=mask, other=0.0).to(tl.float32)
    distance = tl.where(offset > 0, up, down)
    return value + offset * distance, distance


@triton.jit
def _moved_weights(
    offset_pointer,
    value_pointer,
    up_pointer,
    down_pointer,
    follow_pointer,
    scale_pointer,
    out_pointer,
    rows_in_all,
    width,
    follow_stride,
    smallest_normal,
    fraction_bits,
    largest,
    HAS_FOLLOW: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    group = tl.program_id(1)
    inside = rows < rows_in_all
    mask = inside[:, None]
    place = rows[:, None] * width + group * BLOCK + columns[None, :]
    weight, _ = _continuous(offset_pointer, value_pointer, up_pointer, down_pointer, place, mask)
    if HAS_FOLLOW:
        entries = columns[:, None] * BLOCK + columns[None, :]
        follow = tl.load(follow_pointer + group * follow_stride + entries)
        weight = tl.dot(weight, follow, input_precision="ieee")
    scale = tl.load(scale_pointer + rows * (width // BLOCK) + group, mask=inside, other=1.0)[:, None]
    moved = round_to_element(weight * inverse_power_of_two(scale), smallest_normal, fraction_bits, largest) * scale
    tl.store(out_pointer + place, moved.to(tl.bfloat16), mask=mask)


@triton.jit
def _gradients(
    gradient_pointer,
    offset_pointer,
    value_pointer,
    up_pointer,
    down_pointer,
    follow_pointer,
    scale_pointer,
    of_offset_pointer,
    of_follow_pointer,
    of_exponent_pointer,
    rows_in_all,
    width,
    follow_stride,
    smallest_normal,
    fraction_bits,
    largest,
    HAS_FOLLOW: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    rows = part * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    group = tl.program_id(1)
    groups = width // BLOCK
    inside = rows < rows_in_all
    mask = inside[:, None]
    place = rows[:, None] * width + group * BLOCK + columns[None, :]
    entries = columns[:, None] * BLOCK + columns[None, :]
    gradient = tl.load(gradient_pointer + place, mask=mask, other=0.0).to(tl.float32)
    weight, distance = _continuous(offset_pointer, value_pointer, up_pointer, down_pointer, place, mask)
    of_weight = gradient
    followed = weight
    if HAS_FOLLOW:
        follow = tl.load(follow_pointer + group * follow_stride + entries)
        followed = tl.dot(weight, follow, input_precision="ieee")
        of_weight = tl.dot(gradient, tl.trans(follow), input_precision="ieee")
        of_follow = tl.dot(tl.trans(weight), gradient, input_precision="ieee")
        tl.store(of_follow_pointer + (part * groups + group) * BLOCK * BLOCK + entries, of_follow)
    if HAS_EXPONENT:
        scale = tl.load(scale_pointer + rows * groups + group, mask=inside, other=1.0)[:, None]
        scaled = followed * inverse_power_of_two(scale)
        moved = round_to_element(scaled, smallest_normal, fraction_bits, largest) * scale
        error = moved - tl.where(tl.abs(scaled) > largest, 0.0, followed)
        of_exponent = tl.sum(gradient * error, axis=1) * 0.6931471805599453
        tl.store(of_exponent_pointer + rows * groups + group, of_exponent, mask=inside)
    tl.store(of_offset_pointer + place, of_weight * distance, mask=mask)


def moved_weights(offset: Tensor, moves: WeightMoves, element: FloatElement) -> Tensor:
    """The function `plain_moved_weights`: bfloat16 [N, K]."""
    rows, width = offset.shape
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=offset.device)
    _moved_weights[(triton.cdiv(rows, ROWS), width // BLOCK.value)](
        *_pointers(offset, moves),
        out,
        rows,
        width,
        _follow_stride(moves),
        *_grid_of(element),
        HAS_FOLLOW=moves.follow is not None,
        ROWS=ROWS,
    )
    return out


def moved_weights_gradients(
    gradient: Tensor, offset: Tensor, moves: WeightMoves, element: FloatElement, wants_exponent: bool
) -> WeightGradients:
    """The function `plain_moved_weights_gradients`."""
    rows, width = offset.shape
    groups, parts = width // BLOCK.value, triton.cdiv(rows, ROWS)
    of_offset = torch.empty_like(offset)
    shape = (parts, groups, BLOCK.value, BLOCK.value)
    of_follow = None if moves.follow is None else torch.empty(shape, dtype=torch.float32, device=offset.device)
    of_exponent = torch.empty(rows, groups, dtype=torch.float32, device=offset.device) if wants_exponent else None
    _gradients[(parts, groups)](
        gradient.contiguous(),
        *_pointers(offset, moves),
        of_offset,
        of_offset if of_follow is None else of_follow,
        of_offset if of_exponent is None else of_exponent,
        rows,
        width,
        _follow_stride(moves),
        *_grid_of(element),
        HAS_FOLLOW=of_follow is not None,
        HAS_EXPONENT=wants_exponent,
        ROWS=ROWS,
    )
    if of_follow is not None and moves.follow is not None:
        of_follow = of_follow.sum(dim=(0, 1), keepdim=True)[0] if len(moves.follow) == 1 else of_follow.sum(dim=0)
    return WeightGradients(of_offset, of_follow, of_exponent)


def _pointers(offset: Tensor, moves: WeightMoves) -> tuple[Tensor, ...]:
    follow = offset if moves.follow is None else moves.follow.contiguous()
    return offset, moves.value, moves.up, moves.down, follow, moves.scales.contiguous()


def _follow_stride(moves: WeightMoves) -> int:
    return 0 if moves.follow is None or len(moves.follow) == 1 else BLOCK.value**2


def _grid_of(element: FloatElement) -> tuple[float, int, float]:
    return 2.0**element.min_exponent, element.fraction_bits, element.max
