"""The product of unquantized inputs and coded weights: with a kernel if it runs, otherwise dequantized piece by
piece."""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.kernels.dispatch import Choice, has_triton, multiply
from mxrot.kernels.fixed_rows import has_invariant_rows
from mxrot.kernels.plain.coded_weights import CodedWeight, plain_coded_product

MOST_ROWS = 128
"""With more rows, dequantized weights are faster."""
READ_PACKED = ("mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8")
"""Formats that the kernel reads."""
PATH = "codes"


def choose_coded(rows: int, weight: CodedWeight, dtype: torch.dtype, device: torch.device) -> Choice:
    """The way to multiply `rows` rows of inputs of `dtype` by the weight on this device."""
    if device.type != "cuda":
        return Choice(None, f"the kernel that reads codes runs on GPUs, not on {device.type}")
    if not has_triton():
        return Choice(None, "Triton is not installed")
    if weight.format.name not in READ_PACKED:
        return Choice(None, f"the kernel reads {', '.join(READ_PACKED)}, not {weight.format.name}")
    if dtype != torch.bfloat16:
        return Choice(None, f"the kernel takes inputs in bfloat16, not in {str(dtype).removeprefix('torch.')}")
    if rows > MOST_ROWS and not has_invariant_rows():
        return Choice(None, f"{rows} rows are more than {MOST_ROWS}: weights are written out")
    return Choice(PATH, "weights are read in codes")


def coded_product(x: Tensor, weight: CodedWeight, dtype: torch.dtype) -> Tensor:
    """x [..., K] W_q^T, as `plain_coded_product` defines it, rounded to `dtype` once: [..., N]."""
    rows = x.numel() // max(1, x.shape[-1])
    if choose_coded(rows, weight, x.dtype, x.device).path is not None:
        from mxrot.kernels.fused.coded_weights import coded_product as fused

        return fused(x, weight, dtype, has_invariant_rows())
    is_exact = x.dtype == torch.bfloat16 and weight.format.grid.is_exact_in_bfloat16(weight.format.rule())
    return plain_coded_product(x, weight, lambda inputs, values: multiply(inputs, values, is_exact)).to(dtype)
