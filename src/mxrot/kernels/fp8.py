"""The product of lifted activations and lifted weights: one FP8 matrix product.

Both operands are exact, so what is left of accuracy is the accumulator. Hopper's matrix units add FP8 products up in
fewer bits than float32; `fast=False` moves partial sums to float32 registers in between, which makes the error that of
a bfloat16 product.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def fp8_product(inputs: Tensor, weights: Tensor, row_scales: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """inputs E5M2 [..., K] @ weights E4M3 [N, K]^T, output n times `row_scales`[n] (float32 [N]): `dtype` [..., N].

    On CUDA devices with FP8 matrix hardware (compute capability 8.9 and later). The static power of two of the
    inputs belongs into `row_scales`.
    """
    flat = inputs.reshape(-1, inputs.shape[-1])
    ones = _ones(len(flat), inputs.device)
    # Scales for each row and column come with bfloat16 results only.
    product = torch._scaled_mm(
        flat, weights.t(), scale_a=ones, scale_b=row_scales[None], out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return product.to(dtype).view(*inputs.shape[:-1], len(weights))


@lru_cache(maxsize=64)
def _ones(rows: int, device: torch.device) -> Tensor:
    return torch.ones(rows, 1, device=device)
