"""A Llama of two blocks with random weights: grouped queries, biases if asked for, gains that are not one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.surgery import Weights

HIDDEN, INTERMEDIATE, VOCABULARY = 64, 96, 50


def tiny_llama(
    dtype: torch.dtype = torch.float64, value_heads: int = 2, biases: bool = False, seed: int = 0
) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=value_heads,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        attention_bias=biases,
        mlp_bias=biases,
    )
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        is_gain = name.endswith("norm.weight")
        parameter.copy_(values.abs() + 0.1 if is_gain else values * 0.2)
    return model


def first_block(model: LlamaForCausalLM) -> LlamaDecoderLayer:
    block = model.get_submodule("model.layers.0")
    assert isinstance(block, LlamaDecoderLayer)
    return block


def run_first_block(model: LlamaForCausalLM, seed: int = 1) -> Tensor:
    """Outputs of the first block for random hidden states [2, 7, hidden]."""
    hidden = torch.randn(2, 7, HIDDEN, dtype=model.dtype, generator=torch.Generator().manual_seed(seed))
    cos, sin = model.get_submodule("model.rotary_emb")(hidden, torch.arange(7)[None])
    output = first_block(model)(hidden, position_embeddings=(cos, sin))
    return output[0] if isinstance(output, tuple) else output


def weights_of(block: LlamaDecoderLayer) -> Weights:
    linears = [linear for site in LLAMA.sites for linear in site.linears]
    return {name: block.get_parameter(f"{name}.weight").double() for name in linears}


def load_weights(block: LlamaDecoderLayer, weights: Weights) -> None:
    for name, weight in weights.items():
        block.get_parameter(f"{name}.weight").copy_(weight)
