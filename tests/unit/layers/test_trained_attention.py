"""Attention with quantized keys and values and gradients: the numbers of the other way, and gradients by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.layers.test_cached_attention import WIDTH, module_with, random, scheme_of
from torch import Tensor

from mxrot.layers.cached_attention import cached_attention
from mxrot.layers.installed_cache import installed_cache
from mxrot.layers.trained_attention import is_trained

CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "hadamard": {"key_transform": "hadamard", "value_transform": "hadamard"},
    "stored": {"key_transform": "stored", "value_transform": "stored"},
}
HEADS, KEPT, TOKENS = 4, 2, 12


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(2, HEADS, TOKENS, WIDTH),
        random(2, KEPT, TOKENS, WIDTH, seed=1),
        random(2, KEPT, TOKENS, WIDTH, seed=2),
    )


def window(size: int) -> Tensor:
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return ((distance >= 0) & (distance < size))[None, None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mask", [None, window(5)], ids=["causal", "window"])
def test_it_gives_what_is_given_without_gradients(case: str, mask: Tensor | None) -> None:
    module = module_with(scheme_of(**CASES[case]), KEPT)
    expected, _ = cached_attention(module, *inputs(), mask, scaling=0.3)
    found, _ = cached_attention(module, *(x.requires_grad_() for x in inputs()), mask, scaling=0.3)
    assert found.requires_grad and torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_rounded_numbers_at_what_was_not_rounded(case: str) -> None:
    """With K = Q(k T) and V = Q(v U) for leaves, the gradients of k and v are theirs, through T and U."""
    module = module_with(scheme_of(**CASES[case]), KEPT)
    installed = installed_cache(module)
    assert installed is not None
    made = installed.matrices(module, WIDTH, torch.device("cpu"), torch.float64)
    eye = torch.eye(WIDTH, dtype=torch.float64)[None]
    T, U = (eye if x is None else x for x in (made.keys, made.values))
    q, k, v = (x.requires_grad_() for x in inputs())
    weights = random(2, TOKENS, HEADS, WIDTH, seed=3)
    (cached_attention(module, q, k, v, None)[0] * weights).sum().backward()
    query = q.detach().requires_grad_()
    K = installed.scheme.keys(k.detach() @ T).requires_grad_()
    V = installed.scheme.values(v.detach() @ U).requires_grad_()
    turned = (query.unflatten(1, (KEPT, -1)) @ torch.linalg.inv(T).mT[:, None]).flatten(1, 2)
    scores = turned @ K.repeat_interleave(2, dim=1).mT * WIDTH**-0.5
    p = scores.masked_fill(~window(TOKENS), -torch.inf).softmax(dim=-1)
    heads = (p @ V.repeat_interleave(2, dim=1)).unflatten(1, (KEPT, -1)) @ torch.linalg.inv(U)[:, None]
    (heads.flatten(1, 2).transpose(1, 2) * weights).sum().backward()
    for one, other in ((q.grad, query.grad), (k.grad, K.grad @ T.mT), (v.grad, V.grad @ U.mT)):  # type: ignore[operator]
        assert one is not None and torch.allclose(one, other, rtol=0, atol=1e-12)


def test_what_it_cannot_do_is_done_the_other_way() -> None:
    x = random(1, 2, 3, WIDTH).requires_grad_()
    assert is_trained(scheme_of(), (x, x, x), None)
    assert not is_trained(scheme_of(), (x, x, x), 30.0)
    assert not is_trained(scheme_of(last=4), (x, x, x), None) and not is_trained(scheme_of(first=1), (x, x, x), None)
    assert not is_trained(scheme_of(), tuple(x.detach() for _ in range(3)), None)
    with torch.no_grad():
        assert not is_trained(scheme_of(), (x, x, x), None)


def test_under_autocast_the_type_is_that_of_the_query() -> None:
    module = module_with(scheme_of(**CASES["hadamard"]), KEPT)
    q, k, v = (x.float().requires_grad_() for x in inputs())
    expected, _ = cached_attention(module, q, k, v, None)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = cached_attention(module, q, k, v, None)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=0, atol=0.05) and not torch.equal(found, expected)
