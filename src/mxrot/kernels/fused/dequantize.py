"""MXFP4 weights as bfloat16 in one pass (Triton), for devices and shapes without a product of packed codes.

Every E2M1 number times a power of two is a bfloat16 number, so nothing is rounded. `QTensor.dequantize_packed` is the
specification, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.kernels.fused.arithmetic import power_of_two

ROWS = 8
GROUPS = 32


@triton.jit
def _values(codes):
    """The E2M1 values of 4-bit codes in int32, float32."""
    code = codes & 7
    above = (code + 252) << 22
    magnitude = tl.where(code >= 2, above, code * 0x3F000000)  # 0 and 0.5
    # Set the sign bit: compiled code computes -x as 0 - x, which loses the sign of zero.
    return (magnitude | ((codes & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _upper_half(values):
    """float32 numbers with at most 8 significant bits as bfloat16."""
    return (values.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _dequantize(
    codes_pointer, scales_pointer, out_pointer, rows_in_all, groups_in_all, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    groups = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    pairs = tl.arange(0, 16)[None, None, :]
    inside = (rows < rows_in_all) & (groups < groups_in_all)
    place = rows * groups_in_all + groups
    packed = tl.load(codes_pointer + place * 16 + pairs, mask=inside, other=0).to(tl.int32)
    stored = tl.load(scales_pointer + place, mask=inside, other=0).to(tl.int32)
    scales = tl.where(stored == 255, float("nan"), power_of_two(tl.minimum(stored, 254) - 127))
    values = tl.join(_upper_half(_values(packed & 15) * scales), _upper_half(_values(packed >> 4) * scales))
    target = (out_pointer + place * 32 + pairs * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    tl.store(target, values, mask=inside[:, :, :, None])


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 [N, K] from codes uint8 [N, K/2], two per byte, and E8M0 bytes [N, K/32]."""
    rows, groups = scales.shape
    out = torch.empty(rows, groups * 32, dtype=torch.bfloat16, device=codes.device)
    if out.numel():
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(groups, GROUPS))
        _dequantize[grid](codes.contiguous(), scales.contiguous(), out, rows, groups, ROWS=ROWS, GROUPS=GROUPS)
    return out
