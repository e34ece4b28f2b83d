"""Attention with quantized operands, against its definition written out query by query."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from mxrot.errors import ConfigError
from mxrot.formats import AttentionOperands, TensorQuantizer, get_format
from mxrot.layers import operands_of, quantize_attention, restore_attention
from mxrot.layers.quantized_attention import quantized_attention

BLOCK = 32
FORMATS = {"queries_keys": "amxfp4", "probabilities_values": "amxfp4"}


def operands(**formats: str) -> AttentionOperands:
    found = {}
    for name, one in formats.items():
        format = get_format(one)
        found[name] = TensorQuantizer(format, format.rule())
    return AttentionOperands(**found)


def module_with(chosen: AttentionOperands) -> nn.Module:
    module = nn.Module()
    module.config = tiny_config(attn_implementation="sdpa")
    quantize_attention(module, chosen)
    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(chosen: AttentionOperands, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """[batch, tokens, heads, width]: each query by itself, on the keys up to the last one that it sees; `seen`
    [batch, queries, keys]."""
    of_scores, of_values = (one or (lambda x: x) for one in (chosen.queries_keys, chosen.probabilities_values))
    shared = q.shape[1] // k.shape[1]
    found = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=torch.float64)
    for batch in range(len(q)):
        padding = ~seen[batch].any(dim=0)
        for head in range(q.shape[1]):
            keys, values = k[batch, head // shared], v[batch, head // shared].clone()
            values[padding] = 0
            for index in range(q.shape[2]):
                places = seen[batch, index].nonzero().flatten()
                if not len(places):
                    continue
                end = int(places[-1]) + 1
                scores = of_scores(keys[:end]) @ of_scores(q[batch, head, index]) * scaling
                p = scores.masked_fill(~seen[batch, index, :end], -torch.inf).softmax(dim=0)
                room = -(-end // BLOCK) * BLOCK
                whole_p, whole_v = torch.zeros(room, dtype=p.dtype), torch.zeros(room, v.shape[-1], dtype=p.dtype)
                whole_p[:end], whole_v[:end] = p, values[:end]
                found[batch, index, head] = of_values(whole_p) @ of_values(whole_v.T.contiguous()).T
    return found


CASES = {
    "both": FORMATS,
    "scores": {"queries_keys": "amxfp4"},
    "values": {"probabilities_values": "mxfp4"},
    "two formats": {"queries_keys": "int4_row", "probabilities_values": "mxfp8_e4m3"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 70])
def test_it_is_what_the_definition_says(tokens: int, name: str) -> None:
    chosen = operands(**CASES[name])
    q, k, v = random(2, 4, tokens, 32), random(2, 2, tokens, 32, seed=1), random(2, 2, tokens, 32, seed=2)
    found, none = quantized_attention(module_with(chosen), q, k, v, None, scaling=0.3)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(2, -1, -1)
    assert none is None and found.dtype == torch.float64 and found.is_contiguous()
    assert torch.allclose(found, written_out(chosen, q, k, v, seen, 0.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_float", [False, True])
def test_it_is_so_with_padding_on_either_side(is_float: bool) -> None:
    """Also for a cache with room for more keys than there are."""
    chosen = operands(**FORMATS)
    q, k, v = random(3, 2, 40, 32), random(3, 1, 48, 32, seed=1), random(3, 1, 48, 32, seed=2) * 5
    seen = torch.ones(40, 48, dtype=torch.bool).tril().repeat(3, 1, 1)
    seen[1, :, :5] = False
    seen[2, :, 36:] = False
    mask = seen[:, None]
    if is_float:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    found, _ = quantized_attention(module_with(chosen), q, k, v, mask, scaling=0.3)
    assert torch.allclose(found, written_out(chosen, q, k, v, seen, 0.3), rtol=0, atol=1e-12)
    assert found[1, :5].eq(0).all() and not found.isnan().any()


def test_many_queries_at_once_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = operands(**FORMATS)
    q, k, v = random(1, 2, 40, 32), random(1, 2, 40, 32, seed=1), random(1, 2, 40, 32, seed=2)
    whole, _ = quantized_attention(module_with(chosen), q, k, v, None)
    monkeypatch.setattr("mxrot.layers.quantized_attention.NUMBERS_AT_ONCE", {"cpu": 1})
    assert torch.allclose(quantized_attention(module_with(chosen), q, k, v, None)[0], whole, rtol=0, atol=1e-12)


def test_nothing_follows_into_a_token() -> None:
    """Not by way of a scale, either."""
    chosen = operands(**FORMATS)
    q, k, v = random(1, 2, 50, 32), random(1, 2, 50, 32, seed=1), random(1, 2, 50, 32, seed=2)
    before, _ = quantized_attention(module_with(chosen), q, k, v, None)
    for changed in (k, v):
        changed[:, :, 37:] *= 100
    after, _ = quantized_attention(module_with(chosen), q, k, v, None)
    assert torch.equal(after[:, :37], before[:, :37]) and not torch.equal(after[:, 37:], before[:, 37:])


def test_in_bfloat16_it_is_computed_in_float32() -> None:
    chosen = operands(**FORMATS)
    q, k, v = (random(1, 2, 40, 32, seed=seed).bfloat16() for seed in range(3))
    found, _ = quantized_attention(module_with(chosen), q, k, v, None)
    wide, _ = quantized_attention(module_with(chosen), q.float(), k.float(), v.float(), None)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantized_attention(module_with(chosen), q, k, v, None)[0], found)


def test_the_gradient_is_that_of_rounded_operands_as_if_nothing_had_been_rounded() -> None:
    """For one query and one key p is 1: the gradient of v is p's rounded value times what comes back."""
    chosen = operands(**FORMATS)
    q, k, v = (random(1, 1, 1, 32, seed=seed).requires_grad_() for seed in range(3))
    quantized_attention(module_with(chosen), q, k, v, None)[0].sum().backward()
    assert v.grad is not None  # 1 is 6 / 6, and that scale rounds to 0.15625
    assert torch.allclose(v.grad, torch.full_like(v, 6 * 0.15625), rtol=0, atol=1e-12)
    q, k = (random(1, 1, 40, 32, seed=seed).requires_grad_() for seed in range(2))
    v = random(1, 1, 40, 32, seed=2)
    quantized_attention(module_with(chosen), q, k, v, None)[0].square().sum().backward()
    assert q.grad is not None and k.grad is not None and q.grad.abs().sum() > 0 and k.grad.isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"softcap": 30.0}, {"sliding_window": 8}, {"s_aux": torch.zeros(1)}, {"dropout": 0.1}]
)
def test_what_it_does_not_know_is_refused(wrong: dict[str, Any]) -> None:
    x = random(1, 1, 4, 32)
    with pytest.raises(ConfigError, match=f"knows no {next(iter(wrong))}; take attn_implementation='sdpa'"):
        quantized_attention(module_with(operands(**FORMATS)), x, x, x, None, **wrong)


def test_masks_of_another_kind_are_refused() -> None:
    """Without one, flash attention lets the last query see the last key, and PyTorch's the first query the first."""
    module, x = module_with(operands(**FORMATS)), random(1, 1, 4, 32)
    module.quantized_operands.before._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="knows no masks of attn_implementation='flash_attention_2'; take"):
        quantized_attention(module, x, x, x, None)


# In a model.


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(head_dim=32)).eval().double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.mul_(20)  # scores that differ
    return model


@pytest.fixture(scope="module")
def model(plain: PreTrainedModel) -> PreTrainedModel:
    found = copy.deepcopy(plain)
    for block in found.model.layers:
        quantize_attention(block.self_attn, operands(**FORMATS))
    return found


def test_another_attention_is_chosen_by_nothing_but_the_module(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    ids = random_windows(2, 40)
    expected = model(ids).logits
    assert not torch.allclose(expected, plain(ids).logits, rtol=1e-3)
    other = copy.deepcopy(model)
    for implementation in ("eager", "sdpa"):
        other.set_attn_implementation(implementation)
        assert torch.allclose(other(ids).logits, expected, rtol=0, atol=1e-12)
    for block in other.model.layers:
        assert operands_of(block.self_attn) == operands(**FORMATS)
        restore_attention(block.self_attn)
        assert operands_of(block.self_attn) is None and block.self_attn.config is other.config
    assert torch.equal(other(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("prompt", [1, 20, 32, 45])
def test_token_by_token_is_the_whole(model: PreTrainedModel, prompt: int) -> None:
    ids = random_windows(2, 66)
    expected = model(ids).logits
    out = model(ids[:, :prompt], use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    for index in range(prompt, ids.shape[1]):
        out = model(ids[:, index : index + 1], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    assert torch.allclose(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-10)


def test_a_cache_of_fixed_size_and_pieces_of_text(model: PreTrainedModel) -> None:
    ids = random_windows(1, 66)
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=80)
    logits = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([40, 25, 1], dim=1)]
    assert torch.allclose(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-10)


def test_generating_is_what_the_whole_gives(model: PreTrainedModel) -> None:
    ids = random_windows(1, 29)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model(made).logits[:, 28:-1].argmax(dim=-1), made[:, 29:])


def test_padding_of_whole_blocks_changes_nothing(model: PreTrainedModel) -> None:
    ids = random_windows(1, 40)
    padded = torch.cat([torch.zeros(1, BLOCK, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= BLOCK).long()[None]
    places = (torch.arange(padded.shape[1]) - BLOCK).clamp(min=0)[None]
    found = model(padded, attention_mask=mask, position_ids=places).logits[:, BLOCK:]
    assert torch.allclose(found, model(ids).logits, rtol=0, atol=1e-10)
