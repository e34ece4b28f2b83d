"""One token a sequence through kernels: one launch packs its key and value, others read what is packed."""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.kernels import CachedTokens, CacheMatrices, TokenRows, append_tokens, decode_attention, decodes_packed
from mxrot.layers.packed_cache import PackedCacheLayer
from mxrot.layers.packed_tokens import PackedTokens


def decode_packed(
    layer: PackedCacheLayer,
    matrices: CacheMatrices,
    query: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor | None:
    """Attention of a query [B, heads, 1, D] to what `layer` keeps, its new token included, in the shape and type of it.

    None, and nothing is done, where kernels do not run: for several tokens, for the first token of a cache, where
    tokens are read in 16 bits, and for masks of numbers, which may be other than large ones.
    """
    is_flags = mask is None or mask.dtype == torch.bool
    if query.shape[2] != 1 or not layer.keys.length or layer.scheme.first or layer.scheme.last or not is_flags:
        return None
    for tokens in (layer.keys, layer.values):
        tokens.reserve(1)
    cached = _rows(layer, matrices, 0)
    if not decodes_packed(query, cached):
        return None
    place = layer.keys.length
    turned = layer.take_by(lambda key, value: append_tokens(query, key, value, cached, place))
    before = layer.keys.length - layer.visible
    seen = None if mask is None else mask[:, 0, 0, : layer.visible].expand(len(query), -1)
    read = cached if not before else _rows(layer, matrices, before)
    found = decode_attention(turned, read, layer.visible, seen, scaling, softcap)
    layer.trim()
    return found


def _rows(layer: PackedCacheLayer, matrices: CacheMatrices, skipped: int) -> CachedTokens:
    """The buffers from the first token that is kept, or a later one."""
    return CachedTokens(_from(layer.keys, skipped), _from(layer.values, skipped), matrices)


def _from(tokens: PackedTokens, skipped: int) -> TokenRows:
    start = tokens.start + skipped
    views = {name: buffer[:, :, start:] for name, buffer in tokens.buffers.items()}
    return TokenRows(tokens.quantizer, views.pop("codes"), views)
