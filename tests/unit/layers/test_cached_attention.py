"""Attention that reads a quantized cache, against its definition written out query by query."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config
from torch import Tensor, nn

from mxrot.errors import ConfigError
from mxrot.formats import CacheScheme, TensorQuantizer
from mxrot.layers import PackedCacheLayer, cache_scheme_of, quantize_cache, restore_cache
from mxrot.layers.cached_attention import cached_attention
from mxrot.layers.installed_cache import installed_cache, turned

WIDTH = 32


def scheme_of(keys: str = "mxfp4", values: str = "int4_row_asym", **more: Any) -> CacheScheme:
    return CacheScheme(TensorQuantizer.of(keys), TensorQuantizer.of(values), **more)


def module_with(scheme: CacheScheme, heads: int = 2) -> nn.Module:
    module = nn.Module()
    module.own = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    module.config = tiny_config(attn_implementation="sdpa")
    quantize_cache(module, scheme, WIDTH, heads)
    for seed, name in enumerate(scheme.stored_names):
        getattr(module, name).data = torch.eye(WIDTH) + 0.1 * random(heads, WIDTH, WIDTH, seed=90 + seed).float()
    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hadamard(size: int) -> Tensor:
    """Sylvester's, from its definition: (-1)^(bits that i and j share)."""
    signs = [[1 - 2 * (bin(i & j).count("1") % 2) for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def written_out(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """[batch, tokens, heads, width]: each query by itself; `seen` [batch, queries, keys], whose last key is its own."""
    scheme = cache_scheme_of(module)
    assert scheme is not None
    shared = q.shape[1] // k.shape[1]
    found = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=torch.float64)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    for batch in range(len(q)):
        begin = int(seen[batch].any(dim=0).nonzero()[0])
        for head in range(q.shape[1]):
            own = head // shared
            made = {"none": lambda name: eye, "hadamard": lambda name: hadamard(WIDTH)}
            made["stored"] = lambda name, own=own: getattr(module, name)[own].double()
            T, U = made[scheme.key_transform]("key_transform"), made[scheme.value_transform]("value_transform")
            packed_k, packed_v = scheme.keys(k[batch, own] @ T), scheme.values(v[batch, own] @ U)
            for index in range(q.shape[2]):
                places = seen[batch, index].nonzero().flatten()
                if not len(places):
                    continue
                exact = (places[-1] - places < scheme.last) | (places - begin < scheme.first)
                read_k = torch.where(exact[:, None], k[batch, own, places], packed_k[places] @ T.inverse())
                read_v = torch.where(exact[:, None], v[batch, own, places], packed_v[places] @ U.inverse())
                found[batch, index, head] = (read_k @ q[batch, head, index] * scaling).softmax(dim=0) @ read_v
    return found


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hadamard": {"key_transform": "hadamard", "value_transform": "hadamard"},
    "stored": {"key_transform": "stored", "value_transform": "stored"},
    "first": {"first": 5},
    "last": {"last": 9},
    "all": {"first": 5, "last": 9, "key_transform": "stored", "value_transform": "hadamard"},
    "last of itself": {"last": 1, "first": 1, "keys": "mxfp8_e4m3"},
}


def read_in_pieces(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, pieces: list[int], is_float: bool = False
) -> Tensor:
    """By way of a packed layer."""
    scheme = cache_scheme_of(module)
    assert scheme is not None
    layer, found, start = PackedCacheLayer(scheme), [], 0
    for length in pieces:
        stop = start + length
        key, value = layer.update(k[:, :, start:stop], v[:, :, start:stop])
        mask = seen[:, None, start:stop, :stop]
        if is_float:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        found.append(cached_attention(module, q[:, :, start:stop], key, value, mask, scaling=0.3)[0])
        start = stop
    return torch.cat(found, dim=1)


def causal(batch: int, tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(batch, 1, 1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_it_is_what_the_definition_says(tokens: int, name: str) -> None:
    module = module_with(scheme_of(**CASES[name]))
    q, k, v = random(2, 4, tokens, WIDTH), random(2, 2, tokens, WIDTH, seed=1), random(2, 2, tokens, WIDTH, seed=2)
    found, none = cached_attention(module, q, k, v, None, scaling=0.3)
    expected = written_out(module, q, k, v, causal(2, tokens), 0.3)
    assert none is None and found.dtype == torch.float64 and found.is_contiguous()
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [3, 1, 17, 1, 18], [25] + [1] * 15])
@pytest.mark.parametrize("name", CASES)
def test_through_the_cache_it_is_the_same_however_it_is_cut(name: str, pieces: list[int]) -> None:
    """Three sequences, two of them with padding on the left, one of which with more than a piece."""
    module = module_with(scheme_of(**CASES[name]))
    q, k, v = random(3, 4, 40, WIDTH), random(3, 2, 40, WIDTH, seed=1), random(3, 2, 40, WIDTH, seed=2)
    seen = causal(3, 40)
    seen[1, :, :2] = False
    seen[2, :, :22] = False
    expected = written_out(module, q, k, v, seen, 0.3)
    for is_float in (False, True):
        found = read_in_pieces(module, q, k, v, seen, pieces, is_float)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert found[2, :22].eq(0).all()


@pytest.mark.parametrize("name", ["plain", "all"])
def test_slices_of_any_size_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_with(scheme_of(**CASES[name]))
    q, k, v = random(2, 4, 40, WIDTH), random(2, 2, 40, WIDTH, seed=1), random(2, 2, 40, WIDTH, seed=2)
    seen = causal(2, 40)
    seen[1, :, :7] = False
    whole = read_in_pieces(module, q, k, v, seen, [40])
    for numbers in (1, 2000):
        monkeypatch.setattr("mxrot.layers.sliced_attention.NUMBERS_AT_ONCE", {"cpu": numbers})
        assert torch.allclose(read_in_pieces(module, q, k, v, seen, [30, 10]), whole, rtol=0, atol=1e-12)
        given, _ = cached_attention(module, q, k, v, seen[:, None], scaling=0.3)
        assert torch.allclose(given, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_is_what_is_quantized_without_a_cache_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """However many tokens come at once. Read with one key a query, of which attention gives the value."""
    module = module_with(scheme_of(**CASES[name] | {"first": 0, "last": 0}))
    k, v = (random(1, 2, 40, WIDTH, seed=seed).to(dtype) for seed in (1, 2))
    scheme, installed = cache_scheme_of(module), installed_cache(module)
    assert scheme is not None and installed is not None
    matrices = installed.matrices(module, WIDTH, k.device, torch.float32)
    keys, values = scheme.keys(turned(k, matrices.keys)), scheme.values(turned(v, matrices.values))
    for pieces in ([40], [1] * 40, [7, 33]):
        layer = PackedCacheLayer(scheme)
        for key, value in zip(k.split(pieces, dim=2), v.split(pieces, dim=2), strict=True):
            cached_attention(module, key, *layer.update(key, value), None)
        assert torch.equal(layer.keys.read(0, 40), keys) and torch.equal(layer.values.read(0, 40), values)
    eye = torch.eye(40, dtype=torch.bool)[None, None]
    given, _ = cached_attention(module, k, k, v, eye)
    layer = PackedCacheLayer(scheme)
    through, _ = cached_attention(module, k, *layer.update(k, v), eye)
    assert torch.equal(given, through)


def test_in_bfloat16_it_is_computed_in_float32() -> None:
    module = module_with(scheme_of(**CASES["all"]))
    q, k, v = (random(1, 2, 40, WIDTH, seed=seed).bfloat16() for seed in range(3))
    found, _ = cached_attention(module, q, k, v, None)
    wide, _ = cached_attention(module, q.float(), k.float(), v.float(), None)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cached_attention(module, q, k, v, None)[0], found)


def test_a_soft_cap_bends_scores_before_the_mask() -> None:
    module = module_with(scheme_of(last=40))
    q, k, v = (random(1, 2, 6, WIDTH, seed=seed) for seed in range(3))
    found, _ = cached_attention(module, q, k, v, None, scaling=1.0, softcap=2.0)
    scores = (2 * (q @ k.mT / 2).tanh()).masked_fill(~causal(1, 6), -torch.inf)
    assert torch.allclose(found, (scores.softmax(dim=-1) @ v).transpose(1, 2), rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_what_is_not_rounded() -> None:
    """Of the sum over keys and values: with one key, v has the gradient of the output, through U and U^-1."""
    module = module_with(scheme_of(**CASES["stored"]))
    q, k, v = (random(1, 2, 1, WIDTH, seed=seed).requires_grad_() for seed in range(3))
    cached_attention(module, q, k, v, None)[0].sum().backward()
    assert v.grad is not None and torch.allclose(v.grad, torch.ones_like(v), rtol=0, atol=1e-6)
    q, k, v = (random(1, 2, 40, WIDTH, seed=seed).requires_grad_() for seed in range(3))
    module.key_transform.requires_grad_()
    cached_attention(module, q, k, v, None)[0].square().sum().backward()
    for tensor in (q, k, v, module.key_transform):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0


def test_no_gradient_passes_what_is_packed() -> None:
    layer, x = PackedCacheLayer(scheme_of()), random(1, 2, 4, WIDTH).requires_grad_()
    with pytest.raises(ConfigError, match=r"no gradient passes .* call the model under torch.no_grad"):
        layer.update(x, x)


@pytest.mark.parametrize(("wrong", "words"), [({"s_aux": torch.zeros(1)}, "sinks"), ({"dropout": 0.1}, "dropout")])
def test_what_it_does_not_know_is_refused(wrong: dict[str, Any], words: str) -> None:
    x = random(1, 1, 4, WIDTH)
    with pytest.raises(ConfigError, match=f"knows no {words}; take attn_implementation='sdpa'"):
        cached_attention(module_with(scheme_of()), x, x, x, None, **wrong)


def test_masks_of_another_kind_are_refused() -> None:
    module, x = module_with(scheme_of()), random(1, 1, 4, WIDTH)
    module.quantized_cache.before._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="knows no masks of attn_implementation='flash_attention_2'"):
        cached_attention(module, x, x, x, None)


def test_heads_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="heads of width 48 are not a multiple of 32"):
        quantize_cache(nn.Linear(1, 1), scheme_of(), 48, 2)


def test_it_is_undone() -> None:
    module = nn.Linear(1, 1)
    module.config = config = tiny_config(attn_implementation="sdpa")
    before = set(vars(module))
    restore_cache(module)
    quantize_cache(module, scheme_of(key_transform="stored"), WIDTH, 2)
    assert "key_transform" in module.state_dict() and module.config is not config
    restore_cache(module)
    assert module.config is config and set(vars(module)) == before and set(module.state_dict()) == {"weight", "bias"}
    assert not module._forward_pre_hooks and cache_scheme_of(module) is None


def test_matrices_move_with_the_module_and_stay_float32() -> None:
    module = nn.Linear(1, 1)
    module.config = tiny_config(attn_implementation="sdpa")
    quantize_cache(module, scheme_of(key_transform="stored"), WIDTH, 2)
    model = nn.Sequential(module).to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16 and module.key_transform.dtype == torch.float32
    assert set(dict(model.named_parameters())) == {"0.weight", "0.bias", "0.key_transform"}
    model.to("meta")
    assert module.key_transform.device.type == module.weight.device.type == "meta"
    model.to_empty(device="cpu")
    assert module.key_transform.device.type == "cpu"


def test_a_copy_has_matrices_of_its_own() -> None:
    module = module_with(scheme_of(key_transform="stored"))
    other = copy.deepcopy(module)
    other.to("meta")
    assert module.key_transform.device.type == "cpu" and other.key_transform.device.type == "meta"
    restore_cache(other)
    assert cache_scheme_of(module) is not None and len(module._forward_pre_hooks) == 1
