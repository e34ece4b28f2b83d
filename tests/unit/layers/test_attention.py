from collections.abc import Iterator

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from mxrot.layers import attention, fused_norms, shared_heads, unmasked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Four heads, two of keys and values."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the queries that came to PyTorch's attention."""
    seen = []
    own = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda q, *a, **k: (seen.append(tuple(q.shape)), own(q, *a, **k))[1],
    )
    yield seen


def gradients(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(ids).logits.square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_a_prompt_and_its_gradients_are_the_same(model: PreTrainedModel) -> None:
    ids = random_windows(3, 20)
    expected, of_expected = model(ids).logits, gradients(model, ids)
    with shared_heads(model):
        found, of_found = model(ids).logits, gradients(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_one_token_under_a_mask_is_one_query_for_each_shared_key(
    model: PreTrainedModel, calls: list[tuple[int, ...]]
) -> None:
    """Layers do not look at the mask's left part: hidden positions must change nothing."""
    torch.manual_seed(0)
    query, key, value = torch.randn(5, 4, 1, 16), torch.randn(5, 2, 9, 16), torch.randn(5, 2, 9, 16)
    mask = (torch.arange(9) < 6).expand(5, 1, 1, 9)
    found, _ = attention.shared_heads_attention(nn.Module(), query, key, value, mask, scaling=0.25)
    assert calls == [(5, 2, 2, 16)]
    whole = [part[:, :, :6].repeat_interleave(2, dim=1) for part in (key, value)]
    expected = nn.functional.scaled_dot_product_attention(query, *whole, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_a_token_that_sees_all_keys_needs_no_mask(model: PreTrainedModel, calls: list[tuple[int, ...]]) -> None:
    ids = random_windows(3, 20)
    expected = model(ids).logits[:, -1]
    before = model(ids[:, :-1], use_cache=True).past_key_values
    calls.clear()
    with unmasked(model):
        found = model(ids[:, -1:], past_key_values=before).logits[:, -1]
    assert set(calls) == {(3, 4, 1, 16)} and model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("more", [{"dropout": 0.5}, {"softcap": 20.0}, {"sliding_window": 4}])
def test_what_it_does_not_know_is_left_to_transformers(more: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "sdpa", lambda *a, **k: (seen.append(k), (torch.zeros(1), None))[1]
    )
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    attention.shared_heads_attention(nn.Module(), query, key, key, None, **more)
    assert len(seen) == 1 and more.items() <= seen[0].items()


def test_another_attention_is_left_as_it_is(model: PreTrainedModel) -> None:
    model.config._attn_implementation = "eager"
    with shared_heads(model):
        assert model.config._attn_implementation == "eager"
    model.config._attn_implementation = "sdpa"
    with pytest.raises(KeyError), shared_heads(model):
        assert model.config._attn_implementation == attention.NAME
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_fused_norms_compute_the_same_and_go_away(model: PreTrainedModel) -> None:
    ids = random_windows(3, 20)
    expected, of_expected = model(ids).logits, gradients(model, ids)
    norm = model.model.norm
    with fused_norms(model):
        assert "forward" in norm.__dict__
        found, of_found = model(ids).logits, gradients(model, ids)
    assert "forward" not in norm.__dict__
    # transformers computes norms in float32 whatever the type.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
