"""The product of lifted activations and lifted weights: one FP8 matrix product.

Both operands are exact, so the only error is that of the accumulator. Hopper's matrix units sum FP8 products in fewer
bits than float32. With `fast=False`, partial sums are moved to float32 registers, and the error is that of a bfloat16
product.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def fp8_product(inputs: Tensor, weights: Tensor, scales: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """inputs E5M2 [..., K] @ weights E4M3 [N, K]^T times `scales`, float32 [] or one per output [N]: `dtype` [..., N].

    On CUDA devices with FP8 matrix hardware (compute capability 8.9 and later). `scales` must include the static power
    of two of the inputs. With one scale for all outputs, the library has its fastest products, and rounds once to
    `dtype`. With one scale per output, it rounds to bfloat16 first.
    """
    flat = inputs.reshape(-1, inputs.shape[-1])
    if scales.dim():
        ones, scales, out_dtype = _ones((len(flat), 1), inputs.device), scales[None], torch.bfloat16
    else:
        ones, out_dtype = _ones((), inputs.device), dtype
    product = torch._scaled_mm(
        flat, weights.t(), scale_a=ones, scale_b=scales, out_dtype=out_dtype, use_fast_accum=fast
    )
    return product.to(dtype).view(*inputs.shape[:-1], len(weights))


@lru_cache(maxsize=64)
def _ones(shape: tuple[int, ...], device: torch.device) -> Tensor:
    # Explicit, whatever the default type is: vLLM loads a model with the type of its weights as default.
    return torch.ones(shape, dtype=torch.float32, device=device)
