from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.tiny_model import random_windows, write_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from mxrot.errors import ConfigError, NumericsError
from mxrot.evaluation import Divergence, divergence, perplexity
from mxrot.report import divergence_table

WINDOWS = random_windows(5, 24)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and one that is a little off."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    original, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other, original


def test_a_model_is_no_distance_from_itself(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    found = divergence(models[1], models[1], WINDOWS)
    assert found.kl == pytest.approx(0, abs=1e-7) and found.agreement == 1 and found.agreement_error == 0
    assert found.ppl_difference == found.ppl_error == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_what_the_book_says_in_float64(models: tuple[PreTrainedModel, PreTrainedModel], batch: int) -> None:
    model, original = models
    found = divergence(model, original, WINDOWS, batch)
    kl, same, nll = [], [], []
    with torch.no_grad():
        for ids in WINDOWS:
            q, p = (m(ids[None]).logits[0, :-1].double().log_softmax(dim=-1) for m in (model, original))
            kl.append((p.exp() * (p - q)).sum(dim=1).mean())
            same.append((q.argmax(dim=1) == p.argmax(dim=1)).double().mean())
            nll.append(torch.stack([-part.gather(1, ids[1:, None]).mean() for part in (q, p)]))
    kls, agreements, losses = torch.stack(kl), torch.stack(same), torch.stack(nll)
    root = math.sqrt(len(WINDOWS))
    assert found.kl == pytest.approx(float(kls.mean()), rel=1e-4) and found.kl > 0.001
    assert found.kl_error == pytest.approx(float(kls.std()) / root, rel=1e-3)
    assert found.agreement == pytest.approx(float(agreements.mean())) and 0 < found.agreement < 1
    assert found.agreement_error == pytest.approx(float(agreements.std()) / root)
    ppl = losses.mean(dim=0).exp()
    assert found.ppl_difference == pytest.approx(float(ppl[0] - ppl[1]), rel=1e-3)
    assert found.ppl_error == pytest.approx(float((losses @ (ppl * torch.tensor([1.0, -1.0]))).std()) / root, rel=1e-3)
    assert found.ppl == pytest.approx(perplexity(model, WINDOWS).ppl, rel=1e-6)
    assert (found.windows, found.tokens) == (5, 5 * 23)


def test_windows_that_are_alike_leave_no_error(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Paired: the text is the same for both, so what varies is only what the models make of it."""
    found = divergence(*models, WINDOWS[:1].repeat(4, 1))
    assert found.ppl_difference != 0 and found.ppl_error == pytest.approx(0, abs=1e-5)
    assert math.isnan(divergence(*models, WINDOWS[:1]).kl_error)


def test_what_cannot_be_compared(
    models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "small", vocab_size=100))
    with pytest.raises(ConfigError, match="models with 100 and 256 tokens"):
        divergence(small, models[1], WINDOWS)
    broken = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "broken"))
    broken.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(NumericsError, match="NaN"):
        divergence(broken, models[1], WINDOWS)


def test_the_table_and_the_perplexity_in_it(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    found = Divergence(0.25, 0.01, 0.75, 0.02, 14.5, 12.0, 2.5, 0.125, 5, 115)
    table = divergence_table("this", "that", {"words": found})
    cells = [next(iter(column.cells)) for column in table.columns]
    expected = ["words", "0.2500 +- 0.0100", "75.00 +- 2.00", "14.500", "12.000", "+2.500 +- 0.125"]
    assert cells == expected
    wider = replace(found, ppl=1234.567, original_ppl=1111.111, ppl_difference=123.456, ppl_error=12.125)
    widest = divergence_table("this", "that", {"words": wider})
    assert Console(width=200).measure(widest).maximum <= 80, "else figures are cut off on a terminal of 80 columns"
    here, there = divergence(*models, WINDOWS).perplexity, perplexity(models[0], WINDOWS)
    assert (here.windows, here.tokens, here.seq_len) == (there.windows, there.tokens, there.seq_len)
    assert here.ppl == pytest.approx(there.ppl, rel=1e-6) and here.nll == pytest.approx(there.nll, rel=1e-6)
