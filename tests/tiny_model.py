"""A tiny random Llama with a byte tokenizer, as a model folder: what the slower parts are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two blocks, grouped queries, every linear's input a multiple of 32."""
    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**(settings | changes))


def write_tiny_model(folder: Path, dtype: torch.dtype = torch.float16, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of `tiny_config` and its tokenizer, one token a byte; returns `folder`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)  # norm gains that smoothing can show itself on
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Save a tokenizer with one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def random_windows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token windows [count, length] for that model."""
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))
