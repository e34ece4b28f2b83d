"""MXFP4 weights as FP8 E4M3, with one power of two per row (Triton).

An E2M1 number times 2^d is an E4M3 number for d from -8 to 6. A row whose block exponents span no more than that is
lifted without an error, and a product of FP8 matrices is the product of MXFP4 matrices. `plain_lift_weights` is the
specification, bit for bit.

The scale of a block decides which bytes its eight magnitudes become. These eight bytes are computed once per block, in
two words, and each code then looks up its byte. A thread processes half a block: its 8 loaded and 16 stored bytes are
next to those of its neighbours. Triton's interpreter has no inline assembly, so there codes are converted one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HALVES = 256
"""Half blocks per program."""
_LOOK_UP = tl.constexpr(
    """{
    .reg .b32 code, sign, upper;
    and.b32 code, $2, 0x77777777;
    prmt.b32 sign, 0x80808080, 0x80808080, $2;
    shl.b32 sign, sign, 1;
    prmt.b32 $0, $3, $4, code;
    lop3.b32 $0, sign, 0x80808080, $0, 0xEA;
    shr.u32 upper, $2, 16;
    shr.u32 code, code, 16;
    prmt.b32 sign, 0x80808080, 0x80808080, upper;
    shl.b32 sign, sign, 1;
    prmt.b32 $1, $3, $4, code;
    lop3.b32 $1, sign, 0x80808080, $1, 0xEA;
    }"""
)
"""Eight codes to two words of four bytes. A selector of prmt above 7 takes the sign of a byte, here all ones: 0xFF
where a code is negative, else 0x80; one bit to the left and the top bits are the signs. lop3 0xEA is (a & b) | c."""


@triton.jit
def _table(shift):
    """The bytes of |E2M1| 2^shift in E4M3, int32: codes 0 to 3, and codes 4 to 7. Values below 2^-6 are rounded to
    multiples of 2^-9, ties to even. `shift` is at most 6."""
    above = (shift + 6) << 3
    first = tl.where(above == 0, 4, above)
    low = (first << 8) | ((above + 8) << 16) | ((above + 12) << 24)
    high = (above + 16) | ((above + 20) << 8) | ((above + 24) << 16) | ((above + 28) << 24)
    low = tl.where(shift < -6, 0x06040200, low)
    high = tl.where(shift < -6, 0x14100C08, high)
    low = tl.where(shift < -7, 0x03020100, low)
    high = tl.where(shift < -7, 0x0C080604, high)
    low = tl.where(shift < -8, 0x02010000, low)
    high = tl.where(shift < -8, 0x06040302, high)
    low = tl.where(shift < -9, 0x01000000, low)
    high = tl.where(shift < -9, 0x03020201, high)
    low = tl.where(shift < -10, 0, low)
    high = tl.where(shift < -10, 0x02010100, high)
    high = tl.where(shift < -11, 0x01000000, high)
    high = tl.where(shift < -12, 0, high)
    return low, high


@triton.jit
def _bytes(packed, low, high, ASSEMBLY: tl.constexpr):
    """Convert words of eight codes to two words of four bytes each."""
    if ASSEMBLY:
        first, second = tl.inline_asm_elementwise(
            _LOOK_UP, "=&r,=&r,r,r,r", [packed, low, high], (tl.int32, tl.int32), True, 1
        )
    else:
        first, second = packed * 0, packed * 0
        for place in tl.static_range(8):
            code = packed >> (4 * place)
            table = tl.where((code & 4) != 0, high, low)
            byte = ((table >> ((code & 3) << 3)) & 127) | ((code & 8) << 4)
            if place < 4:
                first |= byte << (8 * place)
            else:
                second |= byte << (8 * place - 32)
    return first, second


@triton.jit
def _lift(
    codes_pointer,
    scales_pointer,
    row_exponent_pointer,
    out_pointer,
    groups_in_all,
    programs_along,
    ASSEMBLY: tl.constexpr,
    HALVES: tl.constexpr,
):
    row = (tl.program_id(0) // programs_along).to(tl.int64)
    halves = tl.program_id(0) % programs_along * HALVES + tl.arange(0, HALVES)
    inside = halves < 2 * groups_in_all
    codes_pointer += row * groups_in_all * 4
    out_pointer += row * groups_in_all * 8
    words = halves[:, None] * 2 + tl.arange(0, 2)[None, :]
    packed = tl.load(codes_pointer + words, mask=inside[:, None], other=0, eviction_policy="evict_first")
    scales = tl.load(scales_pointer + row * groups_in_all + halves // 2, mask=inside, other=0)
    exponents = scales.to(tl.int32) - 127 - tl.load(row_exponent_pointer + row)
    low, high = _table(tl.minimum(tl.maximum(exponents, -13), 6))
    whole = tl.zeros([HALVES, 2], tl.int32)
    first, second = _bytes(packed, low[:, None] + whole, high[:, None] + whole, ASSEMBLY)
    words = halves[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out_pointer + words, tl.reshape(tl.join(first, second), [HALVES, 4]), inside[:, None])


def lift_weights(codes: Tensor, scales: Tensor, row_exponents: Tensor, out: Tensor | None = None) -> Tensor:
    """The function `plain_lift_weights`. The result is written to `out`, E4M3 [N, K], if it is given."""
    rows, groups = scales.shape
    lifted = torch.empty(rows, groups * 32, dtype=torch.float8_e4m3fn, device=codes.device) if out is None else out
    if lifted.numel():
        programs_along = triton.cdiv(2 * groups, HALVES)
        _lift[(rows * programs_along,)](
            codes.contiguous().view(torch.int32),
            scales.contiguous(),
            row_exponents,
            lifted.view(torch.int32),
            groups,
            programs_along,
            ASSEMBLY=codes.is_cuda,
            HALVES=HALVES,
            num_warps=HALVES // 128,
        )
    return lifted
