"""Queries, keys and values as attention is given them, and their second moments, beside a plain computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import random_windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mxrot.calibration import first_executor
from mxrot.calibration.attention_inputs import head_moments, watched_heads
from mxrot.models import FAMILIES, find_family

WINDOWS = random_windows(5, 12) % 50


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(FAMILIES[name])).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [windows, heads, tokens, D]."""
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin[:, None]


def by_hand(block: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block of four heads that share two."""
    x, own = block.input_layernorm(hidden), block.self_attn
    if hasattr(own, "qkv_proj"):
        parts = own.qkv_proj(x).split([64, 32, 32], dim=-1)
    else:
        parts = own.q_proj(x), own.k_proj(x), own.v_proj(x)
    query, key, value = (part.unflatten(-1, (-1, 16)) for part in parts)
    if hasattr(own, "q_norm"):
        query, key = own.q_norm(query), own.k_norm(key)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return turned(query, *rotary), turned(key, *rotary), value


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_moments_are_those_of_a_plain_computation(name: str) -> None:
    model = model_of(name)
    family = find_family(model.config, name)
    block = model.model.layers[0]
    executor = first_executor(model, family, WINDOWS, 2)
    executor.begin(block)
    found = head_moments(executor, block.self_attn)
    hidden = model.model.embed_tokens(WINDOWS)
    rotary = model.model.rotary_emb(hidden, torch.arange(12)[None])
    query, key, value = by_hand(block, hidden, rotary)
    expected = torch.zeros(3, 2, 16, 16, dtype=torch.float64)
    for head in range(4):
        for row in query[:, head].flatten(0, 1).double():
            expected[0, head // 2] += torch.outer(row, row) / (2 * WINDOWS.numel())
    for position, x in ((1, key), (2, value)):
        for head in range(2):
            for row in x[:, head].flatten(0, 1).double():
                expected[position, head] += torch.outer(row, row) / WINDOWS.numel()
    for own, wanted in zip(found, expected, strict=True):
        assert torch.allclose(own, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "name", [name for name, one in FAMILIES.items() if one.beside is None and one.heads_obstacle is None]
)
def test_every_family_shows_them_and_is_as_before(name: str) -> None:
    model = model_of(name)
    family = find_family(model.config, name)
    before = model(WINDOWS).logits
    block = model.get_submodule(family.blocks)[
        next(index for index in range(model.config.num_hidden_layers) if family.attends(index))
    ]
    attention: Any = block.get_submodule(family.attention)
    config = attention.config
    executor = first_executor(model, family, WINDOWS, 5)
    executor.begin(block)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    with watched_heads(attention, lambda *x: seen.append(x)):
        assert list(executor.outputs()) == []
    ((query, key, value),) = seen
    assert query.shape == (5, 4, 12, 16) and key.shape == value.shape == (5, 2, 12, 16)
    assert attention.config is config
    assert torch.equal(model(WINDOWS).logits, before)


def test_an_error_leaves_the_attention_as_it_was() -> None:
    model = model_of("llama")
    attention: Any = model.model.layers[0].self_attn
    config = attention.config

    def fails(query: Tensor, key: Tensor, value: Tensor) -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"), watched_heads(attention, fails):
        model(WINDOWS)
    assert attention.config is config and not [name for name in vars(attention) if "sees" in name]
    assert isinstance(attention, nn.Module) and torch.isfinite(model(WINDOWS).logits).all()
