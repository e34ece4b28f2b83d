"""Attention for training beside the one that a checkpoint runs: the same values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.layers.test_cached_attention import WIDTH, module_with, random, scheme_of
from torch import Tensor

from mxrot.layers.cached_attention import CACHED, cached_attention
from mxrot.layers.straight_attention import STRAIGHT, straight_attention, straight_caches

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hadamard": {"key_transform": "hadamard", "value_transform": "hadamard"},
    "stored": {"key_transform": "stored", "value_transform": "stored"},
}


def gradients(found: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(found, inputs, random(*found.shape, seed=9).float())


@pytest.mark.parametrize("name", CASES)
def test_it_is_cached_attention(name: str) -> None:
    module = module_with(scheme_of(**CASES[name]))
    module.num_key_value_groups, module.is_causal = 3, True
    shapes = [(2, 6, 11, WIDTH), (2, 2, 11, WIDTH), (2, 2, 11, WIDTH)]
    inputs = [random(*shape, seed=seed).float().requires_grad_() for seed, shape in enumerate(shapes)]
    expected, _ = cached_attention(module, *inputs, None, scaling=0.2)
    found, _ = straight_attention(module, *inputs, None, scaling=0.2, dropout=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    plain = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.2, enable_gqa=True)
    assert (found.transpose(1, 2) - plain).abs().max() > 0.01  # it does quantize


@pytest.mark.parametrize(
    ("scheme", "expected"), [({}, STRAIGHT), ({"first": 4}, CACHED), ({"last": 4}, CACHED)], ids=str
)
def test_where_it_runs(scheme: dict[str, Any], expected: str) -> None:
    module = module_with(scheme_of(**scheme))
    with straight_caches(module):
        assert module.config._attn_implementation == expected
    assert module.config._attn_implementation == CACHED
    eager = module_with(scheme_of())
    eager.quantized_cache.before._attn_implementation = "eager"
    with straight_caches(eager):
        assert eager.config._attn_implementation == CACHED
