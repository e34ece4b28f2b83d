"""One pass over an activation: block transform, scale, rounding (Triton).

Reads fp16, bf16 or fp32 [M, K], multiplies each block of 32 by its matrix with float32 sums, picks the exponent of
each row's block, rounds to the element, and writes what the codes stand for as bfloat16, which holds it exactly.
`plain_rotate_quantize` is the specification. Given the same transformed values the kernel gives the same bits;
its products are summed in an order of their own, so with a transform a value next to a rounding boundary may fall
on the other side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.formats import Format, ScaleRule
from mxrot.formats.element import FloatElement
from mxrot.kernels.arithmetic import power_of_two, round_to_element

BLOCK = tl.constexpr(32)
ROWS = 128


@triton.jit
def _rotate_quantize(
    x_pointer,
    matrix_pointer,
    out_pointer,
    rows_in_all,
    x_stride,
    out_stride,
    matrix_stride,
    raises_from,
    max_exponent,
    smallest_normal,
    fraction_step,
    largest,
    HAS_MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    group = tl.program_id(1)
    inside = (rows < rows_in_all)[:, None]
    place = group * BLOCK + columns[None, :]
    x = tl.load(x_pointer + rows[:, None] * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_MATRIX:
        entries = columns[:, None] * BLOCK + columns[None, :]
        matrix = tl.load(matrix_pointer + group * matrix_stride + entries)
        x = tl.dot(x, matrix, input_precision="ieee")

    # As integers the bits of |x| are ordered like the numbers, with NaN on top; a float maximum would drop NaN.
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1)
    exponents = (bits >> 23) - 127 - max_exponent + ((bits & 0x7FFFFF) >= raises_from).to(tl.int32)
    exponents = tl.minimum(tl.maximum(exponents, -127), 127)

    scaled = x * power_of_two(-exponents)[:, None]
    rounded = round_to_element(scaled, smallest_normal, fraction_step, largest)
    values = rounded * power_of_two(exponents)[:, None]
    values = tl.where((bits < 0x7F800000)[:, None], values, float("nan"))
    tl.store(out_pointer + rows[:, None] * out_stride + place, values.to(tl.bfloat16), mask=inside)


def rotate_quantize(x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule) -> Tensor:
    """Q(x T) as bfloat16, the shape of `x` [..., K]; `matrices` float32 [1 | G, 32, 32], or None for no transform.

    For 32-element blocks of a FloatElement under a rule with `raises_from`. A block that holds NaN or Inf, after
    the transform, becomes NaN.
    """
    assert isinstance(format.element, FloatElement) and rule.raises_from is not None and format.block == BLOCK.value
    element = format.element
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    out = torch.empty(flat.shape, dtype=torch.bfloat16, device=x.device)
    grid = (triton.cdiv(len(flat), ROWS), flat.shape[1] // BLOCK.value)
    if out.numel():
        _rotate_quantize[grid](
            flat,
            flat if matrices is None else matrices.contiguous(),
            out,
            len(flat),
            flat.stride(0),
            out.stride(0),
            0 if matrices is None or len(matrices) == 1 else BLOCK.value**2,
            rule.raises_from(element),
            element.max_exponent,
            2.0**element.min_exponent,
            2.0**-element.fraction_bits,
            element.max,
            HAS_MATRIX=matrices is not None,
            ROWS=ROWS,
        )
    return out.view(x.shape)
