"""What is kept of the original gives the figures that the original itself gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.tiny_model import random_windows, write_tiny_model
from transformers import PreTrainedModel

from mxrot import api
from mxrot.errors import NumericsError
from mxrot.evaluation import KeptOriginal, divergence, perplexity
from mxrot.models import FolderSource

WINDOWS = random_windows(5, 24)


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=request.param)


def moved(folder: Path) -> PreTrainedModel:
    """The model, a little off."""
    model = api.open_model(folder, "cpu")[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("count", [None, 1, 3, 5, 9])
def test_the_figures_are_those_of_both_models_at_once(
    folder: Path, tmp_path: Path, batch: int, count: int | None
) -> None:
    original, model = api.open_model(folder, "cpu")[0], moved(folder)
    kept = KeptOriginal(FolderSource(folder), tmp_path / "states", count)
    assert not kept.holds("words", WINDOWS, batch)
    assert kept.keep(original, "words", WINDOWS, batch) == perplexity(original, WINDOWS, batch)
    assert kept.holds("words", WINDOWS, batch) and not kept.holds("others", WINDOWS, batch)
    head = kept.head("cpu")
    assert all(parameter.is_meta for parameter in head.model.layers.parameters())  # type: ignore[union-attr]
    alone, apart = kept.measure(model, head, "words", WINDOWS, batch)
    assert alone.ppl == pytest.approx(perplexity(model, WINDOWS, batch).ppl, rel=1e-7)
    # Windows do not see each other, but sums of a batch may be taken in another order where it is cut.
    few = WINDOWS[:count]
    assert vars(apart) == pytest.approx(vars(divergence(model, original, few, batch)), rel=1e-5, nan_ok=True)
    if count is None or count >= len(WINDOWS):
        assert (alone, apart) == (perplexity(model, WINDOWS, batch), divergence(model, original, WINDOWS, batch))
    assert apart.windows == len(few) and alone.windows == len(WINDOWS)


def test_kl_is_the_sum_over_the_vocabulary_in_float64(folder: Path, tmp_path: Path) -> None:
    original, model = api.open_model(folder, "cpu")[0], moved(folder)
    kept = KeptOriginal(FolderSource(folder), tmp_path)
    kept.keep(original, "words", WINDOWS)
    _, apart = kept.measure(model, kept.head("cpu"), "words", WINDOWS)
    with torch.no_grad():
        p, q = (m(WINDOWS).logits[:, :-1].double().log_softmax(dim=-1) for m in (original, model))
    exact = float((p.exp() * (p - q)).sum(dim=-1).mean())
    assert exact > 0.001
    # A float32 logarithm of a probability above 1e-5 is off by at most half an ulp of 16 and what its sum is off by.
    assert apart.kl == pytest.approx(exact, abs=4 * 2.0**-20)


@pytest.mark.parametrize("count", [None, 3])
def test_each_window_is_measured_on_its_own(folder: Path, tmp_path: Path, count: int | None) -> None:
    """Their means are the figures, and a window alone has those that it has among others."""
    original, model = api.open_model(folder, "cpu")[0], moved(folder)
    kept = KeptOriginal(FolderSource(folder), tmp_path, count)
    kept.keep(original, "words", WINDOWS, 2)
    found = kept.means(model, kept.head("cpu"), "words", WINDOWS, 2)
    few = WINDOWS[:count]
    whole = divergence(model, original, few, 2)
    assert found.shape == (4, len(few)) and found.dtype == torch.float64
    assert found.mean(dim=1)[:2].tolist() == pytest.approx([whole.kl, whole.agreement], rel=1e-5)
    assert found.mean(dim=1)[2:].exp().tolist() == pytest.approx([whole.ppl, whole.original_ppl], rel=1e-6)
    for window, means in zip(few, found.T, strict=True):
        alone = divergence(model, original, window[None])
        assert means[:2].tolist() == pytest.approx([alone.kl, alone.agreement], rel=1e-5)
        assert means[2:].exp().tolist() == pytest.approx([alone.ppl, alone.original_ppl], rel=1e-6)


def test_states_are_a_small_part_of_what_log_probabilities_take(folder: Path, tmp_path: Path) -> None:
    original = api.open_model(folder, "cpu")[0]
    KeptOriginal(FolderSource(folder), tmp_path).keep(original, "words", WINDOWS, 2)
    shapes = []
    for path in sorted(tmp_path.iterdir()):
        with safe_open(path, "pt") as file:
            (name,) = file.keys()
            shapes.append(tuple(file.get_slice(name).get_shape()))
    assert sorted(shapes) == [(1, 24, 64), (2, 24, 64), (2, 24, 64)]


def test_what_is_not_finite_is_an_error(folder: Path, tmp_path: Path) -> None:
    original, model = api.open_model(folder, "cpu")[0], moved(folder)
    kept = KeptOriginal(FolderSource(folder), tmp_path)
    kept.keep(original, "words", WINDOWS)
    model.get_output_embeddings().weight.data[3] = torch.nan
    for measure in (kept.measure, kept.means):
        with pytest.raises(NumericsError, match="NaN"):
            measure(model, kept.head("cpu"), "words", WINDOWS)
