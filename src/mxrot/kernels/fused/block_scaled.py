"""MXFP4 times MXFP4 on matrix hardware that applies block scales (Triton).

On GPUs of compute capability 10 and later, `tl.dot_scaled` becomes their own FP4 product. On others the compiler
converts the operands to bfloat16, which is correct but slow. Scales are in the order that this hardware reads
(`plain.swizzle_scales`). `plain_packed_product` is the specification, up to the order of the sums.

It has not been run on such hardware so far. It was tested in Triton's interpreter, and compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.kernels.plain import PackedRows

ROWS = tl.constexpr(128)
GROUPS = tl.constexpr(4)
"""Blocks of 32 in one tile of swizzled scales, and in one step of the sum."""


@triton.jit
def _scales(pointer, tile):
    """Tile number `tile` of swizzled scales: uint8 [128, 4]."""
    flat = tl.load(pointer + tile * 512 + tl.arange(0, 512))
    return tl.reshape(tl.trans(tl.reshape(flat, [32, 4, 4]), 1, 0, 2), [ROWS, GROUPS])


@triton.jit
def _block_scaled(
    input_codes_pointer,
    input_scales_pointer,
    codes_pointer,
    scales_pointer,
    out_pointer,
    inputs_in_all,
    rows_in_all,
    groups_in_all,
):
    inputs = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, GROUPS * 16)
    is_input, is_row = inputs < inputs_in_all, rows < rows_in_all
    tiles = tl.cdiv(groups_in_all, GROUPS)
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for tile in range(tiles):
        place = tile * GROUPS * 16 + pairs
        is_pair = place < groups_in_all * 16
        x = tl.load(
            input_codes_pointer + inputs[:, None] * groups_in_all * 16 + place[None, :],
            mask=is_input[:, None] & is_pair[None, :],
            other=0,
        )
        w = tl.load(
            codes_pointer + rows[None, :] * groups_in_all * 16 + place[:, None],
            mask=is_row[None, :] & is_pair[:, None],
            other=0,
        )
        x_scales = _scales(input_scales_pointer, tl.program_id(0) * tiles + tile)
        w_scales = _scales(scales_pointer, tl.program_id(1) * tiles + tile)
        total = tl.dot_scaled(x, x_scales, "e2m1", w, w_scales, "e2m1", total)
    target = out_pointer + inputs[:, None] * rows_in_all + rows[None, :]
    tl.store(target, total.to(out_pointer.dtype.element_ty), mask=is_input[:, None] & is_row[None, :])


def block_scaled_product(inputs: PackedRows, codes: Tensor, swizzled: Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP4 inputs [..., K] with swizzled scales times codes uint8 [N, K/2] with swizzled scales: `dtype` [..., N]."""
    rows, groups = len(codes), codes.shape[1] // 16
    count = inputs.codes.numel() // (groups * 16)
    out = torch.empty(count, rows, dtype=dtype, device=codes.device)
    if out.numel():
        _block_scaled[(triton.cdiv(count, ROWS.value), triton.cdiv(rows, ROWS.value))](
            inputs.codes, inputs.scales, codes, swizzled, out, count, rows, groups, num_warps=4, num_stages=3
        )
    return out.view(*inputs.codes.shape[:-1], rows)
