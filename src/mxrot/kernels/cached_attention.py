"""Functions on a packed cache: appending new tokens, and attention to packed tokens. Kernels are used if they run."""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.kernels.dispatch import has_triton
from mxrot.kernels.plain.cached_attention import (
    CachedTokens,
    plain_append_tokens,
    plain_decode_attention,
)
from mxrot.kernels.plain.exact_tokens import ExactTokens

_WIDTHS = (64, 128, 256)
_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def append_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cached: CachedTokens,
    position: int | Tensor,
    exact: ExactTokens | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Store key and value in the cache, and return the transformed query, as `plain_append_tokens` defines it."""
    if key.shape[2] == 1 and decodes_packed(query, cached):
        from mxrot.kernels.fused.append_tokens import append_tokens as fused

        return fused(query, key, value, cached, position, exact, visible)
    return plain_append_tokens(query, key, value, cached, position, exact, visible)


def decode_attention(
    query: Tensor,
    cached: CachedTokens,
    length: int | Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    exact: ExactTokens | None = None,
) -> Tensor:
    """Attention of one token per sequence to the first `length` tokens, as `plain_decode_attention` defines it."""
    if decodes_packed(query, cached):
        from mxrot.kernels.fused.cached_attention import decode_attention as fused

        return fused(query, cached, length, visible, scaling, softcap, exact)
    return plain_decode_attention(query, cached, length, visible, scaling, softcap, exact)


def decodes_packed(query: Tensor, cached: CachedTokens) -> bool:
    """True if kernels, which unpack in registers, run for single tokens like `query` [B, heads, 1, D] on this
    device."""
    if not query.is_cuda or not has_triton() or query.dtype not in _TYPES or query.shape[2] != 1:
        return False
    width = query.shape[3]
    if width not in _WIDTHS or (cached.matrices.keys is None) != (cached.matrices.queries is None):
        return False
    from mxrot.kernels.fused.packed_rows import RowLayout

    return all(RowLayout.of(rows.quantizer, width) is not None for rows in (cached.keys, cached.values))
