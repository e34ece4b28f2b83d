"""A tiny random Llama with a byte tokenizer, as a model folder: what the slower parts are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


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


EXPERT_MODELS = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 96, "intermediate_size": 160}),
}


def tiny_mixture(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of four experts a block, two a token.

    The last expert of the first block gets no token: its router reads a channel that is never negative, with a minus.
    The routers of the others read one channel each.
    """
    torch.manual_seed(seed)
    architecture, experts = EXPERT_MODELS[kind]
    shared = tiny_config().to_diff_dict() | experts | {"num_experts_per_tok": 2, "architectures": [architecture]}
    settings = {key: value for key, value in shared.items() if key not in ("model_type", "transformers_version")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | changes))).eval()
    for parameter in model.parameters():
        parameter.data.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.data.mul_(3)
    model.model.embed_tokens.weight.data[:, 0] = 0.4
    if hasattr(model.model.layers[0].mlp, "experts"):
        router = model.model.layers[0].mlp.gate.weight.data
        router[:] = 0.0
        router[-1, 0] = -100.0
        router[:-1, 1 : len(router)].fill_diagonal_(3.0)
    return model


def write_tiny_mixture(
    folder: Path, kind: str, dtype: torch.dtype = torch.float16, fused: bool = False, **changes: Any
) -> Path:
    """Save it and its tokenizer, with a tensor for each linear or with transformers' own tensors of all experts."""
    tiny_mixture(kind, **changes).to(dtype).save_pretrained(folder, save_original_format=not fused)
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
