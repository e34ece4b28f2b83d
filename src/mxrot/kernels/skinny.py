"""Some rows of MXFP4, lifted to E5M2, times packed MXFP4 weights, on FP8 matrix hardware (Triton).

Between a few rows (matvec.py) and many (where weights are lifted as a whole) the weights still set the pace. An E2M1
code moved two bits up is an E4M3 number, 2^-6 of its value, so four codes take a few integer instructions. The product
of one block of 32 with E5M2 inputs is a sum of integers times one power of two, exact in the accumulator; the scale of
the weights' block multiplies it in float32.

`plain_lifted_product` is the specification, up to the order of the sums over blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(32)
MOST_ROWS = 128
_SPREAD = tl.constexpr(
    """{
    .reg .b32 sign, rest;
    shl.b32 sign, $2, 4;
    and.b32 sign, sign, 0x80808080;
    shl.b32 rest, $2, 2;
    and.b32 rest, rest, 0x1C1C1C1C;
    or.b32 $0, sign, rest;
    shr.u32 rest, $2, 2;
    and.b32 rest, rest, 0x1C1C1C1C;
    lop3.b32 $1, $2, 0x80808080, rest, 0xEA;
    }"""
)
"""Four bytes of two codes each to the low ones and the high ones as E4M3; lop3 0xEA is ($2 & 0x80808080) | rest."""


@triton.jit
def _spread(packed, ASSEMBLY: tl.constexpr):
    """The codes in the low and in the high halves of bytes, as the bytes of E4M3."""
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(_SPREAD, "=&r,=r,r", [packed], (tl.uint8, tl.uint8), True, 4)
    else:
        wide = packed.to(tl.int32)
        low = (((wide & 8) << 4) | ((wide & 7) << 2)).to(tl.uint8)
        high = ((wide & 128) | ((wide >> 2) & 28)).to(tl.uint8)
    return low, high


@triton.jit
def _skinny(
    inputs_pointer,
    codes_pointer,
    scales_pointer,
    out_pointer,
    inputs_in_all,
    rows_in_all,
    groups_in_all,
    shift,
    ASSEMBLY: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inputs = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    pairs = tl.arange(0, BLOCK // 2)
    # Columns in the order in which the codes come out: the even ones, then the odd ones.
    columns = tl.arange(0, BLOCK)
    columns = (columns % (BLOCK // 2)) * 2 + columns // (BLOCK // 2)
    is_row, is_input = rows < rows_in_all, inputs < inputs_in_all
    total = tl.zeros([ROWS, INPUTS], tl.float32)
    for group in tl.range(groups_in_all, num_stages=STAGES):
        place = rows * groups_in_all + group
        packed = tl.load(codes_pointer + place[:, None] * 16 + pairs[None, :], mask=is_row[:, None], other=0)
        exponents = tl.load(scales_pointer + place, mask=is_row, other=0).to(tl.int32)
        x = tl.load(
            inputs_pointer + inputs[None, :] * groups_in_all * BLOCK + group * BLOCK + columns[:, None],
            mask=is_input[None, :],
            other=0.0,
        )
        low, high = _spread(packed, ASSEMBLY)
        codes = tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [ROWS, BLOCK])
        weights = codes.to(tl.float8e4nv, bitcast=True)
        if ASSEMBLY:
            sums = tl.dot(weights, x)
        else:
            sums = tl.dot(weights.to(tl.float32), x.to(tl.float32), input_precision="ieee")
        # 2^6 for the codes, 2^shift for the inputs.
        power = tl.minimum(tl.maximum(exponents + 6 + shift, 1), 254) << 23
        scale = tl.where(exponents == 255, float("nan"), power.to(tl.float32, bitcast=True))
        total += sums * scale[:, None]
    target = out_pointer + inputs[None, :] * rows_in_all + rows[:, None]
    tl.store(target, total.to(out_pointer.dtype.element_ty), mask=is_row[:, None] & is_input[None, :])


def skinny_product(inputs: Tensor, shift: int, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As `plain_lifted_product` defines it, for at most `MOST_ROWS` rows of inputs."""
    rows, groups = scales.shape
    count = inputs.numel() // (groups * BLOCK.value)
    out = torch.empty(count, rows, dtype=dtype, device=codes.device)
    if out.numel():
        height = min(64, max(16, triton.next_power_of_2(count)))
        _skinny[(triton.cdiv(rows, 64), triton.cdiv(count, height))](
            inputs.reshape(count, -1),
            codes,
            scales,
            out,
            count,
            rows,
            groups,
            shift,
            ASSEMBLY=codes.is_cuda,
            INPUTS=height,
            ROWS=64,
            STAGES=5,
        )
    return out.view(*inputs.shape[:-1], rows)
