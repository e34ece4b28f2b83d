"""How much passes through a decoder block together."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from mxrot.layers import score_heads

BATCH_TOKENS = {"cpu": 2048, "cuda": 131072}
"""Tokens that pass through a block at once, at most; fixed, so that sums always run in the same order."""
BATCH_ELEMENTS = 1 << 28
"""Bounds tokens times the widest activation, so that a large model's temporaries stay near a gigabyte each."""


def windows_at_once(model: PreTrainedModel, device: torch.device, seq_len: int) -> int:
    """How many calibration windows pass through a block together."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inner = [module for module in linears if module is not model.get_output_embeddings()]
    widest = max(max(linear.in_features, linear.out_features) for linear in inner)
    return max(1, tokens_at_once(max(widest, score_heads(model) * seq_len), device.type) // seq_len)


def tokens_at_once(widest: int, device_type: str) -> int:
    """The same in tokens, where a block makes so many numbers of a token at most, before it goes on."""
    return min(BATCH_TOKENS.get(device_type, BATCH_TOKENS["cpu"]), BATCH_ELEMENTS // widest)
