"""Packed caches in models of several families: generating, pieces of text, padding, windows, beams, crops."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from mxrot.errors import ConfigError
from mxrot.formats import CacheScheme, TensorQuantizer
from mxrot.kernels import CacheMatrices, decode_attention
from mxrot.layers import PackedCache, PackedCacheLayer, cache_scheme_of, quantize_cache, restore_cache

WINDOW = 12
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "phi3": {"pad_token_id": 0},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
}


def scheme_of(format: str = "mxfp4", **more: Any) -> CacheScheme:
    return CacheScheme(TensorQuantizer.of(format), TensorQuantizer.of(format), **more)


SCHEMES = {
    "all in codes": scheme_of("int4_row_asym", key_transform="hadamard"),
    "some in 16 bit": scheme_of(first=3, last=5, key_transform="hadamard", value_transform="hadamard"),
}


def plain_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shared = {k: v for k, v in tiny_config().to_diff_dict().items() if k not in ("model_type", "transformers_version")}
    config = AutoConfig.for_model(kind, **(shared | {"head_dim": 32, "hidden_size": 128} | KINDS[kind]))
    implementation = "eager" if kind == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval().double()
    model.config._experts_implementation = "eager"
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "lm_head")):
            parameter.data.mul_(10)  # scores and logits that differ
    return model.requires_grad_(False)


def quantized(model: PreTrainedModel, scheme: CacheScheme) -> PreTrainedModel:
    found = copy.deepcopy(model)
    for block in found.model.layers:
        quantize_cache(block.self_attn, scheme, 32, model.config.num_key_value_heads)
    return found


_MODELS: dict[tuple[str, str], PreTrainedModel] = {}


def model_of(kind: str, scheme: str) -> PreTrainedModel:
    if (kind, scheme) not in _MODELS:
        _MODELS[kind, scheme] = quantized(plain_model(kind), SCHEMES[scheme])
    return _MODELS[kind, scheme]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SCHEMES)
def model(kind: str, request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(kind, str(request.param))


def in_pieces(model: PreTrainedModel, ids: Tensor, pieces: list[int], cache: Any = None, **more: Any) -> Tensor:
    logits = []
    for piece in ids.split(pieces, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True, **more)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def test_a_text_through_the_cache_is_the_text_without_one(model: PreTrainedModel) -> None:
    """In one pass, in pieces, and token by token; and it is another one than in 16 bits."""
    ids = random_windows(2, 40)
    expected = model(ids, use_cache=False).logits
    for pieces in ([40], [17, 20, 3], [1] * 40):
        assert torch.allclose(in_pieces(model, ids, pieces), expected, rtol=0, atol=1e-9), pieces
    cache = PackedCache.of(model)
    assert torch.allclose(in_pieces(model, ids, [40], cache), expected, rtol=0, atol=1e-9)
    assert cache.get_seq_length() == 40 and all(isinstance(layer, PackedCacheLayer) for layer in cache.layers)
    plain = copy.deepcopy(model)
    for block in plain.model.layers:
        restore_cache(block.self_attn)
    assert (plain(ids).logits - expected).abs().max() > 0.01


def test_generating_packs_and_gives_what_the_whole_gives(model: PreTrainedModel) -> None:
    ids = random_windows(1, 20)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    made = out.sequences
    assert torch.equal(model(made, use_cache=False).logits[:, 19:-1].argmax(dim=-1), made[:, 20:])
    assert isinstance(out.past_key_values, PackedCache) and out.past_key_values.get_seq_length() == 27
    slow = model.generate(ids, attention_mask=torch.ones_like(ids), **options, use_cache=False)
    assert torch.equal(slow.sequences, made)


def padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(len(text) for text in texts)
    ids = torch.stack([torch.cat([torch.zeros(longest - len(text), dtype=torch.int64), text]) for text in texts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(text)).long() for text in texts])
    return ids, mask


def test_a_sequence_gets_in_a_batch_what_it_gets_alone(model: PreTrainedModel) -> None:
    texts = [random_windows(1, length, seed=length)[0] for length in (19, 30, 2)]
    ids, mask = padded(texts)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    for index, text in enumerate(texts):
        alone = model.generate(text[None], attention_mask=torch.ones(1, len(text), dtype=torch.int64), **options)
        assert torch.equal(together[index, -6:], alone[0, -6:])


@pytest.mark.parametrize("kind", ["llama", "gemma2"], indirect=True)
def test_beams_and_samples(model: PreTrainedModel) -> None:
    """Beam search without a cache is the reference; samples of one seed are those of the whole text."""
    ids, mask = padded([random_windows(1, 9, seed=1)[0], random_windows(1, 14, seed=2)[0]])
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **beams)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, **beams, use_cache=False))
    samples = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 2, "pad_token_id": 0}
    drawn = []
    for more in ({}, {"use_cache": False}):
        torch.manual_seed(0)
        drawn.append(model.generate(ids, attention_mask=mask, **samples, **more))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cache_that_the_caller_holds_is_the_one_that_is_filled(scheme: str) -> None:
    """Also one that knows nothing of the model; one of fixed size is left, and what it holds is quantized."""
    model, ids = model_of("llama", scheme), random_windows(2, 30)
    expected = model(ids, use_cache=False).logits
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        first = model(ids[:, :20], past_key_values=cache).logits
        rest = model(ids[:, 20:], past_key_values=cache).logits
        assert torch.allclose(torch.cat([first, rest], dim=1), expected, rtol=0, atol=1e-9)
        assert isinstance(cache, PackedCache) and cache.get_seq_length() == 30
    fixed = StaticCache(config=model.config, max_cache_len=48)
    assert torch.allclose(in_pieces(model, ids, [20, 9, 1], fixed), expected, rtol=0, atol=1e-9)
    assert not any(isinstance(layer, PackedCacheLayer) for layer in fixed.layers)


def test_with_gradients_nothing_is_packed_and_they_pass(kind: str) -> None:
    model, ids = copy.deepcopy(model_of(kind, "some in 16 bit")), random_windows(1, 20)
    expected = model(ids).logits
    model.requires_grad_()
    out = model(ids)
    assert not isinstance(out.past_key_values, PackedCache)
    assert torch.allclose(out.logits, expected, rtol=0, atol=1e-9)
    out.logits.square().mean().backward()
    attention = model.model.layers[0].self_attn
    weight = (attention.qkv_proj if kind == "phi3" else attention.k_proj).weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"], indirect=True)
def test_drafts_are_taken_back(kind: str, scheme: str) -> None:
    """By their number, as a negative one; by what stays, as a positive one; not behind what is kept."""
    model, ids = model_of(kind, scheme), random_windows(2, 40)
    expected = model(ids, use_cache=False).logits[:, 26:]
    cache = PackedCache.of(model)
    cache.activate_past_recording()
    in_pieces(model, ids[:, :22], [22], cache)
    in_pieces(model, torch.cat([ids[:, 22:26], random_windows(2, 6, seed=5)], dim=1), [10], cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 26
    assert torch.allclose(in_pieces(model, ids[:, 26:], [4, 10], cache), expected, rtol=0, atol=1e-9)
    cache.crop(0)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "gemma2"], indirect=True)
def test_a_draft_of_another_model_changes_nothing(kind: str, scheme: str) -> None:
    """Assisted generation by a model with a packed cache of its own: drafts of which most are taken back."""
    model, ids = model_of(kind, scheme), random_windows(1, 20)
    assistant = copy.deepcopy(model)
    assistant.lm_head.weight.data.add_(random_weight(assistant.lm_head.weight))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    found = model.generate(ids, **options, assistant_model=assistant)
    assert torch.equal(found, model.generate(ids, **options))


@pytest.mark.parametrize("kind", ["llama", "gemma2"], indirect=True)
def test_a_prompt_that_many_texts_begin_with_is_read_once(model: PreTrainedModel) -> None:
    """A copy of its cache goes on by itself; and a prompt may be read in chunks by `generate`."""
    ids, cache = random_windows(2, 30), PackedCache.of(model)
    in_pieces(model, ids[:1, :20], [20], cache)
    for text in (ids[:1], torch.cat([ids[:1, :20], ids[1:, 20:]], dim=1)):
        expected = model(text, use_cache=False).logits[:, 20:]
        assert torch.allclose(in_pieces(model, text[:, 20:], [9, 1], copy.deepcopy(cache)), expected, rtol=0, atol=1e-9)
    assert cache.get_seq_length() == 20
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options, prefill_chunk_size=7), model.generate(ids, **options))


def random_weight(like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(0)) * like.std()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_newest_tokens_leave_without_recording_where_nothing_slides(scheme: str) -> None:
    model, ids = model_of("llama", scheme), random_windows(1, 40)
    expected = model(ids, use_cache=False).logits[:, 26:]
    cache = DynamicCache()
    in_pieces(model, ids, [26, 14], cache)
    cache.crop(26)
    cache.crop(100)
    assert cache.get_seq_length() == 26
    assert torch.allclose(in_pieces(model, ids[:, 26:], [14], cache), expected, rtol=0, atol=1e-9)
    if SCHEMES[scheme].last:
        with pytest.raises(RuntimeError, match=r"crop of 30 tokens: .* activate_past_recording"):
            cache.crop(-30)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.allclose(in_pieces(model, ids, [40], cache)[:, 26:], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gemma2"], indirect=True)
def test_sequences_are_chosen_and_repeated(model: PreTrainedModel) -> None:
    texts = [random_windows(1, length, seed=length)[0] for length in (20, 14, 11)]
    ids, mask = padded(texts)
    cache = PackedCache.of(model)
    in_pieces(model, ids, [20], cache, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0))
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    order = [0, 2, 2, 0]
    more = random_windows(4, 3, seed=9)
    whole = torch.cat([mask[order], torch.ones(4, 3, dtype=torch.int64)], dim=1)
    places = (whole.cumsum(dim=1) - 1)[:, -3:].clamp(min=0)
    found = model(more, past_key_values=cache, attention_mask=whole, position_ids=places).logits
    for index, text in enumerate(order):
        alone = model(torch.cat([texts[text], more[index]])[None], use_cache=False).logits[0, -3:]
        assert torch.allclose(found[index], alone, rtol=0, atol=1e-9)


def test_a_window_bounds_what_is_kept() -> None:
    model, ids = model_of("gemma2", "some in 16 bit"), random_windows(1, 500)
    cache = PackedCache.of(model)
    in_pieces(model, ids, [450] + [1] * 50, cache)
    sliding, full = cache.layers
    assert sliding.is_sliding and not full.is_sliding
    assert sliding.keys.length == WINDOW - 1 and sliding.keys.capacity == 64 and full.keys.length == 500
    assert sliding.get_mask_sizes(3) == (WINDOW + 2, 500 - WINDOW + 1) and full.get_mask_sizes(3) == (503, 0)
    assert cache.nbytes == sum(layer.nbytes for layer in cache.layers)


@pytest.mark.parametrize("format", ["mxfp4", "int4_row_asym"])
def test_at_8k_tokens_it_takes_at_most_three_tenths_of_bfloat16(format: str) -> None:
    """One layer, heads of 64, the first 16 and the last 128 tokens in 16 bits; all that is kept is counted."""
    layer = PackedCacheLayer(scheme_of(format, first=16, last=128))
    for tokens in (8100, 91, 1):
        layer.update(*torch.randn(2, 1, 1, tokens, 64, dtype=torch.bfloat16))
        layer.take(CacheMatrices())
        layer.note_padding(None)
        layer.trim()
    assert layer.get_seq_length() == 8192
    assert layer.nbytes <= 0.30 * (2 * 8192 * 64 * 2), layer.nbytes / (2 * 8192 * 64 * 2)


def test_a_model_without_a_scheme_has_no_such_cache() -> None:
    model = plain_model("llama")
    assert cache_scheme_of(model.model.layers[0].self_attn) is None
    with pytest.raises(ConfigError, match="no attention module of this model quantizes"):
        PackedCache.of(model)


NEAR = {"first": 3, "last": 5}
TRANSFORMED = {"key_transform": "hadamard", "value_transform": "hadamard"}


@pytest.mark.parametrize("more", [{}, NEAR, {"first": 3}, {"last": 1}, {"last": 5}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_single_tokens_by_way_of_kernels_are_the_same(
    kind: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their plain twins here, which are float32; with padding, windows and a sequence that leaves."""
    model = quantized(plain_model(kind).float(), scheme_of(**TRANSFORMED, **more))
    ids, mask = padded([random_windows(1, length, seed=length)[0] for length in (19, 30)])
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    read = Mock(wraps=decode_attention)
    monkeypatch.setattr("mxrot.layers.packed_decoding.decode_attention", read)
    logits = []
    for runs in (False, True):
        monkeypatch.setattr("mxrot.layers.packed_decoding.decodes_packed", lambda *_, runs=runs: runs)
        cache, found = PackedCache.of(model), []
        for some in (slice(0, 29), slice(29, 30)):
            options = {"attention_mask": mask[:, : some.stop], "position_ids": places[:, some]}
            found.append(model(ids[:, some], past_key_values=cache, **options).logits.flatten())
        cache.batch_select_indices(torch.tensor([1]))
        found.append(in_pieces(model, random_windows(1, 20), [1] * 20, cache).flatten())
        logits.append(torch.cat(found))
        assert read.call_count == (21 * 2 if runs else 0)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("more", [NEAR, {"first": 20, "last": 40}], ids=str)
def test_kernels_take_over_when_all_first_tokens_have_come(
    more: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token from the first one, back behind it, and to the end again; the texts begin at different places."""
    model = quantized(plain_model("llama").float(), scheme_of(**TRANSFORMED, **more))
    ids, mask = padded([random_windows(1, length, seed=length)[0] for length in (24, 30)])
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    read = Mock(wraps=decode_attention)
    monkeypatch.setattr("mxrot.layers.packed_decoding.decode_attention", read)
    logits = []
    for runs in (False, True):
        monkeypatch.setattr("mxrot.layers.packed_decoding.decodes_packed", lambda *_, runs=runs: runs)
        cache, found = PackedCache.of(model), []
        cache.activate_past_recording()
        for start in (0, 8):
            for token in range(start, 30):
                options = {"attention_mask": mask[:, : token + 1], "position_ids": places[:, token : token + 1]}
                out = model(ids[:, token : token + 1], past_key_values=cache, **options).logits
                found.append(out[mask[:, token] == 1].flatten())
            cache.crop(-22 if not start else 0)
            cache.activate_past_recording()
        logits.append(torch.cat(found))
    complete = 6 + more["first"]
    assert read.call_count == 2 * (30 - complete + 30 - max(complete, 8))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_another_text_in_a_cropped_cache_has_first_tokens_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which begin later than those of the text before."""
    model = quantized(plain_model("llama").float(), scheme_of(**TRANSFORMED, **NEAR))
    ids, mask = padded([random_windows(1, length, seed=length)[0] for length in (10, 30)])
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    monkeypatch.setattr("mxrot.layers.packed_decoding.decodes_packed", lambda *_: True)
    cache = PackedCache.of(model)
    cache.activate_past_recording()
    in_pieces(model, random_windows(2, 20), [18, 1, 1], cache)
    cache.crop(-20)
    for token in range(30):
        options = {"attention_mask": mask[:, : token + 1], "position_ids": places[:, token : token + 1]}
        found = model(ids[:, token : token + 1], past_key_values=cache, **options).logits[:, 0]
        seen = mask[:, token] == 1
        torch.testing.assert_close(found[seen], expected[seen, token], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("format", "more"),
    [
        ("mxfp4", {}),
        ("mxfp8_e4m3", {}),
        ("int4_row_asym", {}),
        ("int2_g32_asym", {}),
        ("mxfp4", {"first": 16, "last": 128}),
        ("int4_row_asym", {"last": 7}),
    ],
    ids=str,
)
def test_on_a_gpu_single_tokens_take_kernels_and_are_those_of_the_plain_path(
    format: str, more: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, of a model with heads of 64; the texts differ in length."""
    torch.manual_seed(0)
    config = tiny_config(head_dim=64, hidden_size=256)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for block in model.model.layers:
        quantize_cache(block.self_attn, scheme_of(format, **TRANSFORMED, **more), 64, 2)
    ids, mask = (x.cuda() for x in padded([random_windows(1, length, seed=length)[0] for length in (99, 300)]))
    model.cuda()
    read = Mock(wraps=decode_attention)
    monkeypatch.setattr("mxrot.layers.packed_decoding.decode_attention", read)
    logits = []
    for runs in (True, False):
        if not runs:
            monkeypatch.setattr("mxrot.layers.packed_decoding.decodes_packed", lambda *_: False)
        cache, found = PackedCache.of(model), []
        for some in (slice(0, 280), *(slice(i, i + 1) for i in range(280, 300))):
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, some]
            out = model(ids[:, some], past_key_values=cache, attention_mask=mask[:, : some.stop], position_ids=places)
            found.append(out.logits)
        logits.append(torch.cat(found, dim=1)[:, 280:])
        assert read.call_count == 20 * 2
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
