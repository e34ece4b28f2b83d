"""Numbers as sums of two bfloat16 numbers, in one pass (Triton). `plain_bfloat16_parts` is the specification."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128


@triton.jit
def _parts(
    x_pointer,
    factors_pointer,
    out_pointer,
    rows_in_all,
    width,
    x_stride,
    HAS_FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < rows_in_all)[:, None] & (columns < width)[None, :]
    x = tl.load(x_pointer + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        x = x * tl.load(factors_pointer + rows, mask=rows < rows_in_all, other=0.0)[:, None]
    first = x.to(tl.bfloat16)
    target = out_pointer + rows[:, None] * (2 * width) + columns[None, :]
    tl.store(target, first, mask=mask)
    tl.store(target + width, (x - first.to(tl.float32)).to(tl.bfloat16), mask=mask)


def two_bfloat16_parts(x: Tensor, factors: Tensor | None = None) -> Tensor:
    """`x` [rows, K], each row times its float32 factor [rows, 1], as two parts: bfloat16 [rows, 2 K]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    out = torch.empty(rows, 2 * width, dtype=torch.bfloat16, device=x.device)
    if out.numel():
        _parts[triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)](
            x,
            x if factors is None else factors.contiguous(),
            out,
            rows,
            width,
            x.stride(0),
            HAS_FACTORS=factors is not None,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            # fused, x * factor - first would not round the product as the plain function does
            enable_fp_fusion=False,
        )
    return out
