"""GPTQ over one block of columns, all rows at once (Triton).

Rows do not depend on each other. Each program processes a few of them through all columns of the block and all
candidate scales, without leaving its registers. `plain_round_columns` is the specification. The kernel may fuse a
multiplication with an addition where the plain code does not, so a weight on a rounding boundary may fall on the other
side. All arithmetic is float64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.formats.element import FloatElement
from mxrot.kernels.plain import RoundedColumns

ROWS = 16
_ROUNDS_TO_INTEGERS = tl.constexpr(2.0**52)
_EXPONENT_BITS = tl.constexpr(0x7FF0000000000000)
_SIGN_BIT = tl.constexpr(-0x8000000000000000)


@triton.jit
def _column(tile, columns, j):
    """Column j of [ROWS, B]."""
    return tl.sum(tl.where((columns == j)[None, :], tile, 0.0), axis=1)


@triton.jit
def _round_columns(
    columns_pointer,
    scales_pointer,
    upper_pointer,
    values_pointer,
    differences_pointer,
    chosen_pointer,
    rows_in_all,
    candidates,
    smallest_normal,
    fraction_step,
    largest,
    ROWS: tl.constexpr,
    B: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, B)
    inside = rows < rows_in_all
    place = rows[:, None] * B + columns[None, :]
    mask = inside[:, None]
    start = tl.load(columns_pointer + place, mask=mask, other=0.0)
    best_values = tl.zeros([ROWS, B], dtype=tl.float64)
    best_differences = tl.zeros([ROWS, B], dtype=tl.float64)
    least = tl.full([ROWS], float("inf"), dtype=tl.float64)
    chosen = tl.zeros([ROWS], dtype=tl.int64)
    for candidate in range(candidates):
        scales = tl.load(scales_pointer + candidate * rows_in_all * B + place, mask=mask, other=0.0)
        tile = start
        values = tl.zeros([ROWS, B], dtype=tl.float64)
        differences = tl.zeros([ROWS, B], dtype=tl.float64)
        cost = tl.zeros([ROWS], dtype=tl.float64)
        for j in range(B):
            weight = _column(tile, columns, j)
            scale = _column(scales, columns, j)
            scaled = tl.where(scale == 0.0, 0.0, weight / tl.where(scale == 0.0, 1.0, scale))
            magnitude = tl.minimum(tl.abs(scaled), largest)
            binade = (magnitude.to(tl.int64, bitcast=True) & _EXPONENT_BITS).to(tl.float64, bitcast=True)
            step = tl.maximum(binade, smallest_normal) * fraction_step
            rounded = ((magnitude / step + _ROUNDS_TO_INTEGERS) - _ROUNDS_TO_INTEGERS) * step
            sign = scaled.to(tl.int64, bitcast=True) & _SIGN_BIT
            value = (rounded.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True) * scale
            difference = weight - value
            diagonal = tl.load(upper_pointer + j * B + j)
            ratios = tl.load(upper_pointer + j * B + columns, mask=columns > j, other=0.0) / diagonal
            tile = tile - difference[:, None] * ratios[None, :]
            here = (columns == j)[None, :]
            values = tl.where(here, value[:, None], values)
            differences = tl.where(here, difference[:, None], differences)
            cost += (difference / diagonal) * (difference / diagonal)
        better = (cost < least) | (candidate == 0)
        least = tl.where(better, cost, least)
        chosen = tl.where(better, candidate, chosen)
        best_values = tl.where(better[:, None], values, best_values)
        best_differences = tl.where(better[:, None], differences, best_differences)
    tl.store(values_pointer + place, best_values, mask=mask)
    tl.store(differences_pointer + place, best_differences, mask=mask)
    tl.store(chosen_pointer + rows, chosen, mask=inside)


def round_columns(columns: Tensor, scales: Tensor, upper: Tensor, element: FloatElement) -> RoundedColumns:
    """The function `plain_round_columns` without zero points. B is a power of two."""
    rows, width = columns.shape
    columns, scales, upper = columns.contiguous(), scales.contiguous(), upper.contiguous()
    values, differences = torch.empty_like(columns), torch.empty_like(columns)
    chosen = torch.empty(rows, dtype=torch.int64, device=columns.device)
    _round_columns[(triton.cdiv(rows, ROWS),)](
        columns,
        scales,
        upper,
        values,
        differences,
        chosen,
        rows,
        len(scales),
        math.ldexp(1.0, element.min_exponent),
        math.ldexp(1.0, -element.fraction_bits),
        element.max,
        ROWS=ROWS,
        B=width,
        num_warps=2,
    )
    return RoundedColumns(values, differences, chosen)
