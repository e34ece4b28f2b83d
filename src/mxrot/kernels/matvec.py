"""A few rows of MXFP4 times MXFP4 weights, straight from the packed codes (Triton).

For generation the weights are read once and little is computed with them, so memory sets the pace as long as a code
costs about one instruction. Twice an E2M1 number is an integer of five bits: a byte permutation looks up the integers
of four codes at once, and one instruction (dp4a) multiplies four of them and adds them up. The sum over a block of 32
is an exact integer; the two powers of two that scale it, and sums over blocks, are float32.

`plain_packed_product` is the specification, up to the order of the sums over blocks. Triton's interpreter has no
inline assembly: there the codes are taken apart one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.kernels.plain import PackedRows

PRODUCTS = 16
"""Rows of weights times rows of inputs that a program holds."""
GROUPS = 32
MOST_ROWS = 8
"""Inputs with more rows have no kernel here."""
_SPREAD = tl.constexpr(
    """{
    .reg .b32 other, high, positive, negative;
    xor.b32 other, $2, 0x88888888;
    prmt.b32 positive, 0x03020100, 0x0C080604, $2;
    prmt.b32 negative, 0x03020100, 0x0C080604, other;
    sub.u32 negative, 0x80808080, negative;
    lop3.b32 $0, positive, negative, 0x80808080, 0xF6;
    shr.u32 high, $2, 16;
    shr.u32 other, other, 16;
    prmt.b32 positive, 0x03020100, 0x0C080604, high;
    prmt.b32 negative, 0x03020100, 0x0C080604, other;
    sub.u32 negative, 0x80808080, negative;
    lop3.b32 $1, positive, negative, 0x80808080, 0xF6;
    }"""
)
"""Eight codes to two words of four signed bytes. A selector of prmt above 7 takes the sign of a byte, here 0: so one
look-up gives the positive codes and 0, and one with all signs turned the negative ones. 128 - b, with its top bit
turned, is -b in each byte; lop3 0xF6 is positive | (negative ^ 0x80808080)."""
_MULTIPLY = tl.constexpr("dp4a.s32.s32 $0, $1, $2, $3;")


@triton.jit
def _integer(code):
    """Twice the E2M1 number of a 4-bit code in int32."""
    magnitude = code & 7
    doubled = tl.where(magnitude < 4, magnitude, (2 + (magnitude & 1)) << (magnitude >> 1) - 1)
    return tl.where((code & 8) != 0, -doubled, doubled)


@triton.jit
def _block_sums(weights, inputs, whole, ASSEMBLY: tl.constexpr):
    """Four times the sums over each block: int32 [1, ROWS, GROUPS, 4] by [INPUTS, 1, GROUPS, 4] to [INPUTS, ROWS,
    GROUPS, 1]; `whole` are zeros."""
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(_SPREAD, "=&r,=&r,r", [weights], (tl.int32, tl.int32), True, 1)
        input_low, input_high = tl.inline_asm_elementwise(_SPREAD, "=&r,=&r,r", [inputs], (tl.int32, tl.int32), True, 1)
        sums = tl.inline_asm_elementwise(
            _MULTIPLY, "=r,r,r,r", [low + whole, input_low + whole, whole], tl.int32, True, 1
        )
        sums = tl.inline_asm_elementwise(
            _MULTIPLY, "=r,r,r,r", [high + whole, input_high + whole, sums], tl.int32, True, 1
        )
    else:
        sums = whole
        for place in tl.static_range(8):
            sums += _integer((weights >> (4 * place)) & 15) * _integer((inputs >> (4 * place)) & 15)
    return tl.sum(sums, axis=3, keep_dims=True)


@triton.jit
def _scale(bytes_of_weights, bytes_of_input):
    """2^(both exponents - 2), the 2 for the doubled codes; NaN where one is."""
    exponents = bytes_of_weights + bytes_of_input - 256
    limited = tl.minimum(tl.maximum(exponents, -126), 127)
    power = ((limited + 127) << 23).to(tl.float32, bitcast=True)
    power = tl.where(exponents < -126, 0.0, power)
    return tl.where((bytes_of_weights == 255) | (bytes_of_input == 255), float("nan"), power)


@triton.jit
def _matvec(
    input_codes_pointer,
    input_scales_pointer,
    codes_pointer,
    scales_pointer,
    out_pointer,
    inputs_in_all,
    rows_in_all,
    groups_in_all,
    INPUTS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # Four dimensions from the first load on, so that nothing has to change its layout: inputs, rows, blocks, words.
    inputs = tl.arange(0, INPUTS)[:, None, None, None]
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[None, :, None, None]
    lanes = tl.arange(0, GROUPS)[None, None, :, None]
    words = tl.arange(0, 4)[None, None, None, :]
    whole = tl.zeros([INPUTS, ROWS, GROUPS, 4], tl.int32)
    totals = tl.zeros([INPUTS, ROWS, GROUPS, 1], tl.float32)
    for start in range(0, groups_in_all, GROUPS):
        groups = start + lanes
        is_weight = (rows < rows_in_all) & (groups < groups_in_all)
        is_input = (inputs < inputs_in_all) & (groups < groups_in_all)
        place, input_place = rows * groups_in_all + groups, inputs * groups_in_all + groups
        codes = tl.load(codes_pointer + place * 4 + words, mask=is_weight, other=0)
        input_codes = tl.load(input_codes_pointer + input_place * 4 + words, mask=is_input, other=0)
        scales = tl.load(scales_pointer + place, mask=is_weight, other=0).to(tl.int32)
        input_scales = tl.load(input_scales_pointer + input_place, mask=is_input, other=0).to(tl.int32)
        sums = _block_sums(codes, input_codes, whole, ASSEMBLY)
        totals += sums.to(tl.float32) * _scale(scales, input_scales)
    sums = tl.reshape(tl.sum(totals, axis=2), [INPUTS, ROWS])
    count = tl.arange(0, INPUTS)[:, None]
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[None, :]
    inside = (count < inputs_in_all) & (row < rows_in_all)
    tl.store(out_pointer + count * rows_in_all + row, sums.to(out_pointer.dtype.element_ty), mask=inside)


def packed_matvec(inputs: PackedRows, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As `plain_packed_product` defines it, for at most `MOST_ROWS` rows of inputs."""
    rows, groups = scales.shape
    count = inputs.scales.numel() // groups
    assert count <= MOST_ROWS
    out = torch.empty(count, rows, dtype=dtype, device=codes.device)
    if out.numel():
        many = triton.next_power_of_2(count)
        height = PRODUCTS // min(many, 4)
        _matvec[(triton.cdiv(rows, height),)](
            inputs.codes.view(count, -1).view(torch.int32),
            inputs.scales,
            codes.view(torch.int32),
            scales,
            out,
            count,
            rows,
            groups,
            INPUTS=many,
            ASSEMBLY=codes.is_cuda,
            ROWS=height,
            GROUPS=GROUPS,
        )
    return out.view(*inputs.codes.shape[:-1], rows)
