"""Weights that others have stored as codes, as numbers again: of models that were published in no other form.

Computed in float32 and rounded once to the type that is asked for. A scale of NaN or infinity gives NaN or infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.formats.element import E2M1, powers_of_two
from mxrot.formats.packing import unpack_codes


def from_mxfp4(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., 32 G] of E2M1 codes, uint8 [..., G, 16] with the even channel in the low nibble, and of E8M0 exponents,
    uint8 [..., G] (OCP Microscaling Formats 1.0, section 5.2).

    bfloat16 holds each exactly, from 2^-133 on.
    """
    scales = powers_of_two(exponents.int() - 127)
    scales = torch.where(exponents == 255, torch.nan, scales)
    return (E2M1.decode(unpack_codes(codes, 4), torch.float32) * scales[..., None]).flatten(-2).to(dtype)


def from_tiles(codes: Tensor, factors: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[N, K] of codes in a type of float, times a factor for each tile of so many rows and columns, float32
    [ceil(N / rows), ceil(K / columns)] (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)."""
    n, k = codes.shape
    of_columns = factors.float().repeat_interleave(columns, dim=1)[:, :k]
    return (codes.float() * of_columns.repeat_interleave(rows, dim=0)[:n]).to(dtype)
