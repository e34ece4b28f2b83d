"""Decoding of one token per sequence with kernels: one launch packs its key and value, others attend to packed
tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.kernels import (
    CachedTokens,
    CacheMatrices,
    ExactTokens,
    TokenRows,
    append_tokens,
    decode_attention,
    decodes_packed,
)
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
    """Attention of a query [B, heads, 1, D] to the tokens in `layer` and its new token. The output has the query's
    shape and type.

    None, with nothing changed, if kernels do not run: for several tokens, for the first token of a cache, while
    sequences lack some of the first tokens, and for masks of numbers, which may hold other than large numbers.
    """
    is_flags = mask is None or mask.dtype == torch.bool
    if query.shape[2] != 1 or not layer.keys.length or not is_flags or not _takes(layer, query):
        return None
    for tokens in (layer.keys, layer.values):
        tokens.reserve(1)
    cached = _rows(layer, matrices, 0)
    if not decodes_packed(query, cached) or not layer.has_first:
        return None
    place = layer.keys.length
    turned = layer.take_by(
        lambda key, value: append_tokens(query, key, value, cached, place, _ring(layer, query, place))
    )
    before = layer.keys.length - layer.visible
    seen = None if mask is None else mask[:, 0, 0, : layer.visible].expand(len(query), -1)
    read = cached if not before else _rows(layer, matrices, before)
    found = decode_attention(turned, read, layer.visible, seen, scaling, softcap, _exact(layer, query))
    layer.trim()
    return found


def _takes(layer: PackedCacheLayer, query: Tensor) -> bool:
    """True if the 16-bit tokens have the type of the query."""
    keeps = layer.scheme.first or layer.scheme.last
    return not keeps or layer.dtype == query.dtype


def _ring(layer: PackedCacheLayer, query: Tensor, place: int) -> ExactTokens | None:
    """The ring that stores the token at `place` in 16 bits. The first tokens are complete already."""
    if not layer.scheme.last:
        return None
    return ExactTokens(query, 0, layer.scheme.last, layer.recent.rings, _shift(layer, place))


def _shift(layer: PackedCacheLayer, place: int) -> int:
    """The difference between a token's place and its row in the ring, if the next token's place is `place`."""
    return (layer.recent.end - place) % layer.recent.capacity


def _exact(layer: PackedCacheLayer, query: Tensor) -> ExactTokens | None:
    """The tokens that an untransformed query reads in 16 bits."""
    first, last = layer.scheme.first, layer.scheme.last
    if not first and not last:
        return None
    rings, visible = layer.recent.rings if last else None, layer.visible
    shift = _shift(layer, visible) if last else 0
    begins = layer.padding if first else None
    return ExactTokens(
        query, first, last, rings, shift, layer.leading if first else None, begins, layer.tokens - visible
    )


def _rows(layer: PackedCacheLayer, matrices: CacheMatrices, skipped: int) -> CachedTokens:
    """The buffers, from the first token that is kept or a later one."""
    return CachedTokens(_from(layer.keys, skipped), _from(layer.values, skipped), matrices)


def _from(tokens: PackedTokens, skipped: int) -> TokenRows:
    start = tokens.start + skipped
    views = {name: buffer[:, :, start:] for name, buffer in tokens.buffers.items()}
    return TokenRows(tokens.quantizer, views.pop("codes"), views)
