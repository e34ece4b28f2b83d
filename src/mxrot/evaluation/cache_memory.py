"""The memory of a quantized cache, measured in a real one, unused room included."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from mxrot.layers import PackedCache, PackedCacheLayer
from mxrot.layers.cache_size import CacheSize, cache_of
from mxrot.layers.installed_cache import CacheMatrices
from mxrot.models import find_family, value_heads
from mxrot.models.positions import position_count

TOKENS = 8192
"""The length of the sequence, or the model's positions if these are fewer."""
_AT_ONCE = 1024


@torch.no_grad()
def measured_cache(model: PreTrainedModel) -> dict[str, Any] | None:
    """The scheme of a model's cache, a number of tokens, and the bytes of a cache for one sequence of this length,
    beside those in 16 bits. None if the cache is not quantized.

    The cache is filled with normal random keys and values, block by block. Nothing is computed by the model.
    """
    scheme = cache_of(model)
    if scheme is None:
        return None
    tokens = min(TOKENS, position_count(model.config) or TOKENS)
    cache = PackedCache.of(model)
    generator = torch.Generator().manual_seed(0)
    heads, width = value_heads(model.config.get_text_config())
    rows = torch.randn(1, heads, min(tokens, _AT_ONCE), width, generator=generator).to(model.device, model.dtype)
    for layer in [one for one in cache.layers if isinstance(one, PackedCacheLayer)]:
        for start in range(0, tokens, _AT_ONCE):
            some = rows[:, :, : tokens - start]
            layer.update(some, some)
            layer.take(CacheMatrices())
            if scheme.first:
                layer.note_padding(None)
            layer.trim()
    plain = CacheSize.of(model.config, find_family(model.config, str(model.name_or_path)), None)
    taken = cache.nbytes + plain.state_bytes(2)  # no block has left a state
    return {
        "scheme": scheme.spelled,
        "tokens": tokens,
        "bytes": taken,
        "bytes_in_16_bit": plain.bytes_at(tokens),
        "ratio": taken / plain.bytes_at(tokens),
    }
