"""Calibration windows that the original model writes itself (LLM-QAT, arXiv 2305.17888, section 2.1).

A text of one kind calibrates for that kind. What the model writes has the spread of what it was trained on, needs no
data, and is never the text that is measured on. Each sequence starts with a random token and goes on by sampling from
the whole distribution; a window is several sequences, because many short ones take less time than few long ones.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

SEQUENCE_TOKENS = 512
CACHE_BYTES = {"cpu": 5e8, "cuda": 1.6e10}
"""Bounds the keys and values of the sequences that are written together."""
SEQUENCES_AT_ONCE = 1024


@torch.no_grad()
def generated_windows(model: PreTrainedModel, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` windows of `length` tokens, int64 [count, length] on the CPU.

    First tokens and the seed of the sampling come from `generator`; the caller's random states are left as they were.
    No sequence ends early: the end-of-text token is not sampled.
    """
    device = model.device
    config = model.config.get_text_config()
    tokens = min(SEQUENCE_TOKENS, length)
    sequences = -(-count * length // tokens)
    first = torch.randint(0, config.vocab_size, (sequences, 1), generator=generator)
    seed = int(torch.randint(0, 2**31, (1,), generator=generator))
    ends = config.eos_token_id
    forbidden = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    options = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=tokens - 1,
        min_new_tokens=tokens - 1,
        suppress_tokens=forbidden or None,
        pad_token_id=0,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        parts = [
            cast(Any, model).generate(part.to(device), generation_config=options).cpu()
            for part in first.split(sequences_at_once(model, tokens))
        ]
    return torch.cat(parts).flatten()[: count * length].view(count, length)


def sequences_at_once(model: PreTrainedModel, tokens: int) -> int:
    """How many sequences of so many tokens are written together."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize
    bound = CACHE_BYTES.get(model.device.type, CACHE_BYTES["cpu"])
    return max(1, min(SEQUENCES_AT_ONCE, int(bound // cache)))
