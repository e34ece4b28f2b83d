"""MXFP4 weights as FP8 E4M3, with one power of two a row (Triton).

An E2M1 number times 2^d is an E4M3 number for d from -8 to 6, so a row whose block exponents span no more than that
is lifted without an error, and a product of FP8 matrices is the product of MXFP4 ones. `plain_lift_weights` is the
specification, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.kernels.arithmetic import power_of_two

BLOCK = tl.constexpr(32)
ROWS = 32
GROUPS = 4


@triton.jit
def _magnitude(codes):
    """|E2M1| of codes in int32; the sign bit must be gone."""
    above = ((codes + 252) << 22).to(tl.float32, bitcast=True)
    return tl.where(codes >= 2, above, codes.to(tl.float32) * 0.5)


@triton.jit
def _value(codes):
    """E2M1 of 4-bit codes in int32."""
    # The sign by its bit: compiled, minus zero is what 0 - x gives, without a sign.
    return (_magnitude(codes & 7).to(tl.int32, bitcast=True) | ((codes & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _lift(
    codes_pointer,
    scales_pointer,
    row_exponent_pointer,
    out_pointer,
    rows_in_all,
    groups,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, BLOCK // 2)
    columns = tl.arange(0, BLOCK)
    is_row = rows < rows_in_all
    inside = is_row[:, None]
    row_exponents = tl.load(row_exponent_pointer + rows, mask=is_row, other=0)
    for step in tl.static_range(GROUPS):
        group = tl.program_id(1) * GROUPS + step
        if group < groups:
            place = rows * groups + group
            packed = tl.load(codes_pointer + place[:, None] * (BLOCK // 2) + pairs[None, :], mask=inside, other=0)
            packed = packed.to(tl.int32)
            values = tl.reshape(tl.join(_value(packed & 15), _value(packed >> 4)), [ROWS, BLOCK])
            exponents = tl.load(scales_pointer + place, mask=is_row, other=0).to(tl.int32) - 127
            shift = tl.minimum(tl.maximum(exponents - row_exponents, -32), 6)
            lifted = values * power_of_two(shift)[:, None]
            # To multiples of 2^-9, ties to even, where the block lies below the window.
            fine = ((tl.abs(lifted) * 512.0 + 8388608.0) - 8388608.0) * 0.001953125
            fine = (fine.to(tl.int32, bitcast=True) | (lifted.to(tl.int32, bitcast=True) & -0x80000000)).to(
                tl.float32, bitcast=True
            )
            lifted = tl.where(tl.abs(lifted) < 0.015625, fine, lifted)
            target = out_pointer + place[:, None] * BLOCK + columns[None, :]
            tl.store(target, lifted.to(tl.float8e4nv), mask=inside)


def lift_weights(codes: Tensor, scales: Tensor, row_exponents: Tensor, out: Tensor | None = None) -> Tensor:
    """As `plain_lift_weights` defines it; into `out`, E4M3 [N, K], if that is given."""
    rows, groups = scales.shape
    lifted = torch.empty(rows, groups * 32, dtype=torch.float8_e4m3fn, device=codes.device) if out is None else out
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(groups, GROUPS))
    if lifted.numel():
        _lift[grid](
            codes.contiguous(), scales.contiguous(), row_exponents, lifted, rows, groups, ROWS=ROWS, GROUPS=GROUPS
        )
    return lifted
