from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from mxrot.bench.cache import cache_scheme
from mxrot.bench.model import random_model
from mxrot.formats import CacheScheme, TensorQuantizer
from mxrot.layers import FixedPackedCache, quantize_cache, unmasked
from mxrot.models import find_family

MXFP4, INT4 = TensorQuantizer.of("mxfp4"), TensorQuantizer.of("int4_row_asym")
SCHEMES = [
    cache_scheme("mxfp8", "none", 32),
    CacheScheme(MXFP4, INT4, key_transform="hadamard"),
    CacheScheme(INT4, MXFP4, key_transform="stored", value_transform="hadamard"),
    CacheScheme(INT4, MXFP4, first=2, last=3, key_transform="hadamard", value_transform="hadamard"),
    CacheScheme(MXFP4, MXFP4, first=3),
    CacheScheme(MXFP4, MXFP4, last=1),
]


def model_of(scheme: CacheScheme, width: int = 32, device: str = "cpu") -> PreTrainedModel:
    config = tiny_config(architectures=["LlamaForCausalLM"], head_dim=width)
    model = random_model(config, torch.device(device)).float()
    family = find_family(config, "the model")
    for block in model.get_submodule(family.blocks).children():
        attention = block.get_submodule(family.attention)
        quantize_cache(attention, scheme, attention.head_dim, config.num_key_value_heads)
        for name in scheme.stored_names:
            getattr(attention, name).data.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.spelled)
def test_token_by_token_it_is_the_whole(scheme: CacheScheme) -> None:
    """With a mask that moves, as in a CUDA graph; and with the visible tokens counted, without one."""
    model = model_of(scheme)
    config = model.config
    ids = torch.arange(14).view(2, 7) * 3
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        masked, counted = FixedPackedCache(9), FixedPackedCache(9)
        assert not masked.is_filled and masked.nbytes == 0
        for position in range(7):
            step = {"input_ids": ids[:, position : position + 1], "position_ids": torch.full((2, 1), position)}
            seen = (torch.arange(9) <= position)[None, None, None]
            masked.position = counted.position = torch.tensor([position])
            counted.visible = position + 1
            found = model(**step, past_key_values=masked, attention_mask=seen).logits
            close(found[:, 0], expected[:, position])
            with unmasked(model):
                close(model(**step, past_key_values=counted).logits, found)
    assert masked.is_filled and masked.get_seq_length() == 0
    heads, width = config.num_key_value_heads, config.head_dim
    each = sum(sum(one.stored_bytes(1, width)) for one in (scheme.keys, scheme.values))
    rows = 2 * (scheme.first + scheme.last)
    assert masked.nbytes == config.num_hidden_layers * 2 * heads * (9 * each + rows * width * 4)


def test_first_tokens_are_those_behind_the_padding() -> None:
    """Also where a token behind them is hidden; a second text goes into the same cache."""
    model = model_of(CacheScheme(MXFP4, MXFP4, first=3, last=2, key_transform="hadamard", value_transform="hadamard"))
    ids, cache, all_places = torch.arange(24).view(2, 12) * 3, FixedPackedCache(12), torch.arange(12)
    for padding in (torch.tensor([4, 0]), torch.tensor([0, 7])):
        places = (all_places - padding[:, None]).clamp(min=0)
        mask = (all_places >= padding[:, None]) & (all_places != 9)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask.long(), position_ids=places, use_cache=False).logits
            for position in range(12):
                cache.position = torch.tensor([position])
                seen = (mask & (all_places <= position))[:, None, None]
                step = {
                    "input_ids": ids[:, position : position + 1],
                    "position_ids": places[:, position : position + 1],
                }
                found = model(**step, attention_mask=seen, past_key_values=cache).logits[:, 0]
                close(found[mask[:, position]], expected[mask[:, position], position])


class Launches(TorchDispatchMode):
    """Names of PyTorch's operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if not function.is_view and "empty" not in function.name():
            self.names.append(function.name())
        return function(*arguments, **named or {})


class Kernel:
    """In place of one of Triton: counts its launches."""

    def __init__(self, launches: Launches, name: str) -> None:
        self.launches, self.name = launches, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **__: self.launches.names.append(self.name)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("more", [{}, {"first": 16, "last": 128}, {"last": 5}], ids=str)
def test_a_step_is_three_launches(more: dict[str, int], is_masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of attention, with tokens in 16 bits or without, on a GPU."""
    launches = Launches()
    for module, name in (
        ("append_tokens", "_append"),
        ("cached_attention", "attention_share"),
        ("combine_shares", "_combine"),
    ):
        target = importlib.import_module(f"mxrot.kernels.fused.{module}")
        monkeypatch.setattr(target, name, Kernel(launches, name))
    monkeypatch.setattr("mxrot.kernels.cached_attention.decodes_packed", lambda *_: True)
    scheme = CacheScheme(MXFP4, MXFP4, key_transform="hadamard", value_transform="hadamard", **more)
    attention = model_of(scheme, 64).model.layers[0].self_attn
    cache = FixedPackedCache(150)
    cache.position = torch.tensor([140])
    query, key = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 1, 64)
    mask = (torch.arange(150) <= 140)[None, None, None] if is_masked else None
    for _ in range(2):
        launches.names.clear()
        layer, _ = cache.update(key, key, 0)
        with torch.no_grad(), launches:
            layer.attend(attention, query, mask, 0.125, None)
    assert launches.names == ["_append", "attention_share", "_combine"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("more", [{"first": 16, "last": 32}, {"last": 5}, {"first": 3}], ids=str)
def test_a_recorded_token_goes_on(more: dict[str, int]) -> None:
    """A CUDA graph whose position moves on the device gives the bits of the same steps without one, and what the whole
    text gives: half of the tokens at least, because a code beside a tie may go the other way in a sum of another order,
    and moves the tokens that read it."""
    model = model_of(CacheScheme(MXFP4, MXFP4, key_transform="hadamard", **more), 64, "cuda")
    text = torch.arange(90, device="cuda")[None] * 3 % 97
    ids, place = text[:, :1].clone(), torch.zeros(1, dtype=torch.int64, device="cuda")

    def step(cache: FixedPackedCache) -> Tensor:
        cache.position = place
        logits: Tensor = model(input_ids=ids, position_ids=place[None], past_key_values=cache).logits
        return logits

    recorded, plain = FixedPackedCache(90), FixedPackedCache(90)
    graph, found, expected = torch.cuda.CUDAGraph(), [], []
    with torch.no_grad(), unmasked(model):
        step(recorded)
        with torch.cuda.graph(graph):
            logits = step(recorded)
        for position in range(90):
            ids.copy_(text[:, position : position + 1])
            place.fill_(position)
            graph.replay()
            found.append(logits.clone())
            expected.append(step(plain))
    assert torch.equal(torch.cat(found), torch.cat(expected))
    with torch.no_grad():
        whole = model(text, use_cache=False).logits[0]
    errors = (torch.cat(found)[:, 0] - whole).abs().amax(dim=1)
    assert float(errors.median()) <= 1e-3


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
