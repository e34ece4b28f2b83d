"""Calibration windows that the original model writes itself (LLM-QAT, arXiv 2305.17888, section 2.1).

A text of one kind calibrates for that kind. What the model writes has the spread of what it was trained on, needs no
data, and is never the text that is measured on. Each window starts with a random token and goes on by sampling from
the whole distribution.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

WINDOWS_AT_ONCE = 64


@torch.no_grad()
def generated_windows(model: PreTrainedModel, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` windows of `length` tokens, int64 [count, length] on the CPU.

    First tokens and the seed of the sampling come from `generator`; the caller's random states are left as they were.
    No window ends early: the end-of-text token is not sampled.
    """
    device = model.device
    vocabulary = int(model.config.get_text_config().vocab_size)
    first = torch.randint(0, vocabulary, (count, 1), generator=generator)
    seed = int(torch.randint(0, 2**31, (1,), generator=generator))
    ends = model.config.get_text_config().eos_token_id
    forbidden = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    options = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        suppress_tokens=forbidden or None,
        pad_token_id=0,
        use_cache=True,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        parts = [
            cast(Any, model).generate(part.to(device), generation_config=options).cpu()
            for part in first.split(WINDOWS_AT_ONCE)
        ]
    return torch.cat(parts)
