"""Attention with quantized keys and values while a model is trained: PyTorch's own operation on Q(k T) and Q(v U).

What `layers.cached_attention` computes there it sums in float32, slice by slice; a step of training, whose products are
bfloat16, takes a small part of that time this way, and keeps no scores for the way back. The values are the same up to
rounding, and gradients pass the quantizers unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mxrot.layers.installed_cache import installed_cache, turned
from mxrot.layers.quantized_attention import rounded

STRAIGHT = "mxrot_straight_attention"


def straight_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """As `cached_attention` for keys and values that come as they are, all of them read from codes."""
    installed = installed_cache(module)
    assert installed is not None
    scheme, device = installed.scheme, query.device
    with torch.autocast(device.type, enabled=False):
        matrices = installed.matrices(module, query.shape[-1], device, torch.float32)
        key = rounded(turned(key.float(), matrices.keys), scheme.keys)
        value = rounded(turned(value.float(), matrices.values), scheme.values)
        query = _by_kept_heads(query.float(), matrices.queries, key.shape[1])
    found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    with torch.autocast(device.type, enabled=False):
        found = _by_kept_heads(found.float().transpose(1, 2), matrices.outputs, key.shape[1])
    return found.transpose(1, 2).contiguous(), None


def _by_kept_heads(x: Tensor, matrices: Tensor | None, kept: int) -> Tensor:
    """x [B, heads, T, D] times `matrices` [1 | kept heads, D, D], those that share a kept head alike."""
    return x if matrices is None else (x.unflatten(1, (kept, -1)) @ matrices[:, None]).flatten(1, 2)


@contextmanager
def straight_caches(model: nn.Module) -> Iterator[None]:
    """While open, attention of this kind runs where a module quantizes all keys and values and knows no soft cap."""
    configs = []
    for module in model.modules():
        installed = installed_cache(module)
        if installed is None or installed.scheme.first or installed.scheme.last:
            continue
        if installed.before._attn_implementation == "sdpa":
            config: Any = module.config
            configs.append((config, config._attn_implementation))
    for config, _ in configs:
        config._attn_implementation = STRAIGHT
    try:
        yield
    finally:
        for config, before in configs:
            config._attn_implementation = before


AttentionInterface.register(STRAIGHT, straight_attention)
