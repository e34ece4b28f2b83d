"""Perplexity against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM

from mxrot.errors import NumericsError
from mxrot.evaluation import Perplexity, perplexity

WINDOWS, LENGTH = 5, 24


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Random, with logits of several units: a shifted or dropped target shows."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).eval()
    model.lm_head.weight.data *= 20
    return model


def window_nlls(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window [W], in float64, one window and one token after the other."""
    found = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        terms = [
            logits[t].exp().sum().log() - logits[t, window[t + 1]]  # logits of a few units: exp is safe
            for t in range(len(window) - 1)
        ]
        found.append(torch.stack(terms).mean())
    return torch.stack(found)


def tolerance(model: LlamaForCausalLM, windows: Tensor) -> float:
    """How far float32 may take the mean.

    Relative to the largest number involved: a logit is a sum over the hidden size (in an order of its own for each
    shape of the product), log-sum-exp one over the vocabulary, a window one over its tokens. Each term of a sum
    costs half a unit in the last place, 2^-24.
    """
    config = model.config
    with torch.no_grad():
        largest = float(model(input_ids=windows).logits.abs().max())
    terms = config.num_hidden_layers * 4 * config.hidden_size + config.vocab_size + windows.shape[1]
    return terms * 2.0**-24 * 2 * largest


def test_is_the_definition(model: LlamaForCausalLM) -> None:
    windows = random_windows(WINDOWS, LENGTH)
    expected = window_nlls(model, windows)
    found = perplexity(model, windows)
    assert expected.std() > 0.05, "the windows are too alike to tell a mistake"
    assert found.nll == pytest.approx(float(expected.mean()), abs=tolerance(model, windows))
    assert found.ppl == math.exp(found.nll)
    assert (found.windows, found.tokens, found.seq_len) == (WINDOWS, WINDOWS * (LENGTH - 1), LENGTH)


def test_is_the_definition_on_the_logits_that_a_bfloat16_model_gives(model: LlamaForCausalLM) -> None:
    model = model.to(torch.bfloat16)
    windows = random_windows(WINDOWS, LENGTH)
    found = perplexity(model, windows, batch_windows=1)
    assert found.nll == pytest.approx(float(window_nlls(model, windows).mean()), abs=tolerance(model, windows))


@pytest.mark.parametrize("batch", [2, 3, WINDOWS, 99])
def test_does_not_depend_on_the_batch(model: LlamaForCausalLM, batch: int) -> None:
    windows = random_windows(WINDOWS, LENGTH)
    alone, together = perplexity(model, windows), perplexity(model, windows, batch_windows=batch)
    assert together.nll == pytest.approx(alone.nll, abs=tolerance(model, windows))
    assert (together.windows, together.tokens) == (alone.windows, alone.tokens)


@pytest.mark.parametrize("positions", [1, 7, LENGTH - 1, LENGTH])
def test_does_not_depend_on_how_many_logits_exist_at_once(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    windows = random_windows(2, LENGTH)
    whole = perplexity(model, windows)
    monkeypatch.setitem(perplexity.__wrapped__.__globals__, "LOGITS_AT_ONCE", positions)  # type: ignore[attr-defined]
    assert perplexity(model, windows).nll == pytest.approx(whole.nll, abs=tolerance(model, windows))


@pytest.mark.parametrize(("batch", "rows"), [(1, 8), (4, 8), (4, 3)])
def test_logits_at_once_are_limited_over_the_whole_batch(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, batch: int, rows: int
) -> None:
    monkeypatch.setitem(perplexity.__wrapped__.__globals__, "LOGITS_AT_ONCE", rows)  # type: ignore[attr-defined]
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.shape[:-1].numel()))
    perplexity(model, random_windows(4, LENGTH), batch)
    looked_at = 2 * 2  # two tokens, to see that logits are those of the model's own forward
    assert sum(seen) == 4 * (LENGTH - 1) + looked_at
    assert max(seen) <= max(rows, batch)


def test_is_the_mean_over_windows(model: LlamaForCausalLM) -> None:
    windows = random_windows(WINDOWS, LENGTH)
    alone = [perplexity(model, window[None]).nll for window in windows]
    assert perplexity(model, windows).nll == pytest.approx(sum(alone) / WINDOWS, abs=1e-12)


def test_a_window_of_two_tokens_scores_one(model: LlamaForCausalLM) -> None:
    assert perplexity(model, random_windows(3, 2)).tokens == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(model: LlamaForCausalLM, bad: float) -> None:
    model.lm_head.weight.data[3, 5] = bad
    with pytest.raises(NumericsError, match="NaN or Inf"):
        perplexity(model, random_windows(2, LENGTH))


def test_tells_its_progress_in_tokens(model: LlamaForCausalLM) -> None:
    told: list[tuple[int, int, str]] = []
    perplexity(model, random_windows(WINDOWS, LENGTH), 2, lambda *news: told.append(news))
    total = WINDOWS * LENGTH
    assert told == [(done, total, "tokens") for done in (0, 2 * LENGTH, 4 * LENGTH, total)]


def test_a_result_is_a_plain_record() -> None:
    assert vars(Perplexity(2.0, math.log(2), 1, 3, 4)).keys() == {"ppl", "nll", "windows", "tokens", "seq_len"}
