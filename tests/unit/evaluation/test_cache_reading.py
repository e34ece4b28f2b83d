"""Perplexity and KL of a model with a quantized cache are read through that cache, and cannot pass it by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from mxrot.evaluation import divergence, measured_cache, perplexity
from mxrot.formats import get_format
from mxrot.formats.block import fake_quantize
from mxrot.layers.packed_tokens import PackedTokens
from mxrot.run_time_cache import RunTimeCache, set_cache
from mxrot.transforms.orders import multiply_by_hadamard

WINDOWS = random_windows(3, 40)
INT2 = RunTimeCache.of("int2")


@pytest.fixture
def model() -> PreTrainedModel:
    """Random, with keys and values that the logits depend on much."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(architectures=["LlamaForCausalLM"], head_dim=32)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in "qkvo":
                layer.self_attn.get_parameter(f"{linear}_proj.weight").mul_(6)
        model.lm_head.weight *= 20
    return model


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of all sequences that were packed, call by call."""
    seen: list[int] = []
    before = PackedTokens.append

    def append(self: PackedTokens, rows: Tensor) -> None:
        seen.append(rows.shape[0] * rows.shape[2])
        before(self, rows)

    monkeypatch.setattr(PackedTokens, "append", append)
    yield seen


def quantized_by_hand(cache: RunTimeCache) -> str:
    """An attention function that reads keys and values which went through the format and back; no cache at all."""
    format = get_format(str(cache.keys))
    turn = multiply_by_hadamard(torch.eye(32, dtype=torch.float64), False)
    matrix = torch.eye(32, dtype=torch.float64) if cache.transform == "none" else turn

    def there_and_back(x: Tensor) -> Tensor:
        rows = (x.double() @ matrix).float()
        return (fake_quantize(rows, format, format.rule()).double() @ torch.linalg.inv(matrix)).to(x.dtype)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        return AttentionInterface()["sdpa"](module, query, there_and_back(key), there_and_back(value), *rest, **more)

    AttentionInterface.register("by_hand_for_test", attend)
    AttentionMaskInterface.register("by_hand_for_test", AttentionMaskInterface()["sdpa"])
    return "by_hand_for_test"


@pytest.mark.parametrize("name", ["int2", "int4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_perplexity_is_that_of_keys_and_values_that_were_quantized(
    model: PreTrainedModel, name: str, transform: str
) -> None:
    cache = RunTimeCache.of(name, transform)
    plain = perplexity(model, WINDOWS).nll
    model.set_attn_implementation(quantized_by_hand(cache))
    expected = perplexity(model, WINDOWS).nll
    model.set_attn_implementation("sdpa")
    set_cache(model, cache)
    found = perplexity(model, WINDOWS).nll
    # A code may fall on the other side of a middle where sums differ in the last bits: a small part of what it costs.
    assert abs(found - expected) < 0.1 * abs(expected - plain)
    assert perplexity(model, WINDOWS, batch_windows=3).nll == pytest.approx(found, abs=1e-4)


def test_every_key_and_value_is_packed_once(model: PreTrainedModel, appended: list[int]) -> None:
    perplexity(model, WINDOWS)
    assert appended == []
    set_cache(model, INT2)
    perplexity(model, WINDOWS, batch_windows=2)
    blocks, both = 2, 2
    assert sum(appended) == blocks * both * WINDOWS.numel()
    appended.clear()
    divergence(model, LlamaForCausalLM(model.config).eval(), WINDOWS)
    assert sum(appended) == blocks * both * WINDOWS.numel()


def test_two_bits_cost_more_than_anything_that_could_pass_them_by(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    twin = LlamaForCausalLM(model.config).eval()
    twin.load_state_dict(model.state_dict())
    plain = perplexity(model, WINDOWS)
    set_cache(model, RunTimeCache.of("mxfp8"))
    fine = divergence(model, twin, WINDOWS)
    set_cache(model, INT2)
    coarse = perplexity(model, WINDOWS)
    apart = divergence(model, twin, WINDOWS)
    assert apart.kl > 0.1 and apart.kl > 10 * fine.kl > 0
    assert apart.ppl == coarse.ppl and apart.original_ppl == plain.ppl


@pytest.mark.parametrize("piece", [1, 7, 39, 40, 64])
@pytest.mark.parametrize("cache", [INT2, RunTimeCache.of("mxfp4", "hadamard", 3, 5)], ids=lambda cache: cache.label)
def test_a_window_in_pieces_gives_the_same(
    model: PreTrainedModel, cache: RunTimeCache, piece: int, appended: list[int]
) -> None:
    plain = perplexity(model, WINDOWS).nll
    set_cache(model, cache)
    whole = perplexity(model, WINDOWS).nll
    calls = len(appended)
    found = perplexity(model, WINDOWS, piece=piece).nll
    assert abs(found - whole) < 0.05 * abs(whole - plain)
    each = -(-WINDOWS.shape[1] // piece)
    assert len(appended) - calls == 2 * 2 * len(WINDOWS) * each


def test_a_second_call_starts_with_an_empty_cache(model: PreTrainedModel) -> None:
    set_cache(model, INT2)
    assert perplexity(model, WINDOWS) == perplexity(model, WINDOWS)


@pytest.mark.parametrize("name", ["mxfp8", "int4", "mxfp4", "int2"])
def test_the_measured_bytes_are_those_counted_and_little_idle_room(model: PreTrainedModel, name: str) -> None:
    assert measured_cache(model) is None
    set_cache(model, RunTimeCache.of(name))
    table = measured_cache(model)
    assert table is not None and table["tokens"] == 512
    bits = {"mxfp8": 8.25, "int4": 4 + 24 / 32, "mxfp4": 4.25, "int2": 2.75}[name]
    counted = table["bytes_in_16_bit"] * bits / 16
    assert counted <= table["bytes"] <= counted * (512 + 512 / 32 + 64) / 512
    assert table["ratio"] == table["bytes"] / table["bytes_in_16_bit"]
    assert table["bytes_in_16_bit"] == 512 * 2 * 2 * 2 * 32 * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", [INT2, RunTimeCache.of("mxfp4", "hadamard", 3, 5)], ids=lambda cache: cache.label)
def test_a_gpu_reads_what_a_cpu_reads(model: PreTrainedModel, cache: RunTimeCache) -> None:
    plain = perplexity(model, WINDOWS).nll
    set_cache(model, cache)
    expected, weighed = perplexity(model, WINDOWS).nll, measured_cache(model)
    on_gpu = model.cuda()
    for piece in (None, 1):  # a token at once takes the kernels
        assert abs(perplexity(on_gpu, WINDOWS, batch_windows=3, piece=piece).nll - expected) < 0.1 * abs(
            expected - plain
        )
    assert measured_cache(on_gpu) == weighed
