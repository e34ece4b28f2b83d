"""Rows of inputs as integers with one scale each, in one launch (Triton).

The kernel reads fp16, bf16 or fp32 [M, K]. It finds the largest magnitude or both ends of a row, computes the scale,
rounds, and writes the codes in the order that `fused.look_up` reads. `plain_quantize_rows` and `in_planes` are the
specification, bit for bit.

Divisions take longer than reading a row. With few rows, several programs therefore share one row: each finds the ends
of the whole row, and rounds its own part. This is one launch, and no program waits for another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxrot.formats import Format, ScaleRule
from mxrot.formats.element import IntElement
from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.plain.look_up import IntegerRows

INFINITY = tl.constexpr(0x7F800000)
"""The bits of Inf in float32. NaN has larger bits."""
SHARED_ROWS = 16
"""Up to this many rows, several programs share each row."""
HALF_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2^23: near this number, float32 has no fractions."""


@triton.jit
def _words(pointer, first, words_in_all, WORDS: tl.constexpr):
    """float32 [WORDS, 16] from words of 16 numbers, from `first` on; zeros beyond the end."""
    word = first + tl.arange(0, WORDS)[:, None]
    return tl.load(pointer + word * 16 + tl.arange(0, 16)[None, :], mask=word < words_in_all, other=0.0).to(tl.float32)


@triton.jit
def _quantize_rows(
    x_pointer,
    codes_pointer,
    scales_pointer,
    words_in_all,
    stride,
    clip,
    largest,
    unit,
    inverse_unit,
    SIGNED: tl.constexpr,
    OVERLAP: tl.constexpr,
    WORDS: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PART
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    x_pointer += row * stride
    x = _words(x_pointer, 0, words_in_all, WORDS)
    # On the bits, which keep a NaN.
    magnitude = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
    if SIGNED:
        low = 0.0
        span = magnitude.to(tl.float32, bitcast=True) * clip
    else:
        low = tl.minimum(tl.min(tl.min(x, axis=1), axis=0), 0.0) * clip
        span = tl.maximum(tl.max(tl.max(x, axis=1), axis=0), 0.0) * clip - low
    scale = tl.div_rn(span, largest * unit).to(tl.float16).to(tl.float32)
    is_finite = (magnitude < INFINITY) & (scale.to(tl.int32, bitcast=True) < INFINITY)
    divisor = tl.where(is_finite & (scale > 0), scale, 1.0)
    if PART < WORDS:
        x = _words(x_pointer, first, words_in_all, PART)
    scaled = tl.div_rn(tl.where(is_finite & (scale > 0), x, 0.0), tl.zeros_like(x) + divisor)
    if SIGNED:
        integers = _rounded(scaled * inverse_unit, -largest, largest)
    else:
        zero = _rounded(tl.div_rn(-low, divisor), 0.0, largest)
        zero = tl.where(is_finite, zero, 0.0)
        integers = _rounded(scaled + zero, 0.0, largest) - zero
    bytes_ = tl.reshape(integers.to(tl.int32) & 255, [PART, 2, 4, 2])
    words = tl.xor_sum(bytes_ << (8 * tl.arange(0, 4)[None, None, :, None]), axis=2)
    plane = 2 * tl.arange(0, 2)[None, None, :] + tl.arange(0, 2)[None, :, None]
    word = (first + tl.arange(0, PART))[:, None, None]
    target = codes_pointer + row * (4 * words_in_all) + plane * words_in_all + word
    tl.store(target, words, mask=word < words_in_all)
    tl.store(scales_pointer + row, tl.where(is_finite, scale * unit, float("nan")), mask=first == 0)


@triton.jit
def _rounded(x, least, most):
    """The nearest integer from `least` to `most`, ties to even."""
    return (tl.minimum(tl.maximum(x, least), most) + HALF_EVEN) - HALF_EVEN


def choose_part(rows: int, words: int) -> int:
    """Words of 16 numbers that a program rounds, out of `words` in each of `rows` rows; a power of two."""
    return min(triton.next_power_of_2(words), 128) if rows <= SHARED_ROWS else triton.next_power_of_2(words)


def choose_warps(words: int) -> int:
    """The number of warps for a row of `words` words of 16 numbers, a power of two."""
    return max(1, min(16, triton.next_power_of_2(words) // 32))


def quantize_rows(x: Tensor, format: Format, rule: ScaleRule) -> IntegerRows:
    """`plain_quantize_rows` of x [..., K], with the codes in the order of `plain.in_planes`. K is a multiple of 16."""
    element = format.element
    assert isinstance(element, IntElement) and format.block is None
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    count, width = rows.shape
    codes = torch.empty(count, width // 4, dtype=torch.int32, device=x.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    if rows.numel():
        overlaps = can_overlap(x.device)
        words = width // 16
        part = choose_part(count, words)
        _quantize_rows[(count, triton.cdiv(words, part))](
            rows,
            codes,
            scales,
            words,
            rows.stride(0),
            float(rule.clip),
            float(element.max_code),
            2.0**element.step_exponent,
            2.0**-element.step_exponent,
            SIGNED=element.is_signed,
            OVERLAP=overlaps,
            WORDS=triton.next_power_of_2(words),
            PART=part,
            num_warps=choose_warps(words),
            launch_pdl=overlaps,
            # fused, high * clip - low would not round the product as the plain function does
            enable_fp_fusion=False,
        )
    shape = x.shape[:-1]
    return IntegerRows(codes.view(torch.int8).view(*shape, width), scales.view(*shape, 1))
