"""Kernels without computation: they measure the time of a launch, and of memory between loads and stores (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAM_BYTES = tl.constexpr(1024)
"""Bytes that a program of `half` reads, as many as one that quantizes 16 blocks of bfloat16."""


@triton.jit
def _nothing(pointer):
    pass


@triton.jit
def _half(pointer, out_pointer, size):
    SIZE: tl.constexpr = PROGRAM_BYTES // 16
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    place = tl.max_contiguous(place, 1)  # a thread stores one number for two that it loads
    inside = place < size
    both = tl.load(pointer + (place[:, None] * 2 + tl.arange(0, 2)[None, :]), mask=inside[:, None])
    first, second = tl.split(both)
    tl.store(out_pointer + place, first ^ second, mask=inside)


def nothing(x: Tensor) -> None:
    """Launch one program of one warp on the device of `x`."""
    _nothing[(1,)](x, num_warps=1)


def half(x: Tensor) -> Tensor:
    """For each 16 bytes of a contiguous `x`, the first 8 xor the others, uint8 [bytes / 2].

    It loads and stores as much as quantizing bfloat16 to FP8, with the same number of programs for few rows, and
    computes almost nothing else.
    """
    out = torch.empty(x.nbytes // 2, dtype=torch.uint8, device=x.device)
    numbers = x.reshape(-1).view(torch.int64)
    programs = triton.cdiv(x.nbytes, PROGRAM_BYTES.value)
    _half[(programs,)](numbers, out.view(torch.int64), len(numbers) // 2, num_warps=1)
    return out
