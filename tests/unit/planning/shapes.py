"""Configs of known sizes, and runs on them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from mxrot.layers import build_apart
from mxrot.models import find_family
from mxrot.planning import ModelShape, Run
from mxrot.recipe import Recipe


def llama_config(hidden: int, ffn: int, blocks: int, heads: int, **changes: Any) -> LlamaConfig:
    """A Llama 3 of this shape."""
    settings: dict[str, Any] = {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
    }
    return LlamaConfig(**(settings | changes))


EARLIER: dict[str, Any] = {
    "calibration__first": "uniform",
    "calibration__held_out": 0.0,
    "permutation": "none",
    "rounding__dampings": (),
    "rounding__target_dampings": (),
    "transform__brake": 1.0,
    "transform__open": 0.0,
}
"""Makes of `mxrot` what it was before it chose by site and ordered channels, which docs/results.md has measured."""

LLAMA_3_8B = llama_config(4096, 14336, 32, 32)
LLAMA_3_70B = llama_config(8192, 28672, 80, 64)
LLAMA_3_405B = llama_config(16384, 53248, 126, 128)
DEMO = llama_config(
    576, 1536, 30, 9, vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, dtype="float16"
)
"""SmolLM2-135M."""


def run_of(
    config: Any,
    chosen: Recipe,
    windows: int,
    seq_len: int,
    stored: torch.dtype = torch.float16,
    device: str = "cpu",
    keeps_model: bool = False,
) -> Run:
    """A run of `chosen` on a model of this config."""
    shape = ModelShape.of(build_apart(config), find_family(config, "here"), chosen)
    return Run(shape, chosen, device, stored, windows, seq_len, keeps_model)
