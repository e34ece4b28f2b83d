"""Dequantize weights of models that were published only as codes.

Values are computed in float32 and rounded once to the requested type. A NaN or infinite scale gives NaN or infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.formats.element import E2M1, powers_of_two
from mxrot.formats.packing import unpack_codes


def from_mxfp4(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize MXFP4 weights to [..., 32 G] (OCP Microscaling Formats 1.0, section 5.2).

    `codes` are E2M1, uint8 [..., G, 16], with the even channel in the low nibble. `exponents` are E8M0, uint8 [..., G].
    bfloat16 holds each value exactly, from 2^-133 on.
    """
    scales = powers_of_two(exponents.int() - 127)
    scales = torch.where(exponents == 255, torch.nan, scales)
    return (E2M1.decode(unpack_codes(codes, 4), torch.float32) * scales[..., None]).flatten(-2).to(dtype)


def from_tiles(codes: Tensor, factors: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Dequantize a matrix [N, K] with one factor per tile (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

    `codes` have a floating-point type. A tile has `rows` rows and `columns` columns; `factors` are float32
    [ceil(N / rows), ceil(K / columns)].
    """
    n, k = codes.shape
    of_columns = factors.float().repeat_interleave(columns, dim=1)[:, :k]
    return (codes.float() * of_columns.repeat_interleave(rows, dim=0)[:n]).to(dtype)
