from pathlib import Path

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import recipe
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mxrot.calibration import Manner, generated_windows, generation
from mxrot.calibration.spreading import Room
from mxrot.errors import ConfigError
from mxrot.quantizing import run as pipeline


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), eos_token_id=7)


@pytest.fixture(scope="module")
def model(source: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def windows(model: PreTrainedModel, count: int = 70, seed: int = 0) -> Tensor:
    return generated_windows(model, count, 24, torch.Generator().manual_seed(seed))


def test_long_windows_are_several_sequences(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SEQUENCE_TOKENS", 10)
    monkeypatch.setattr(generation, "SEQUENCES_AT_ONCE", 2)
    calls = []
    own = generation._sequences
    monkeypatch.setattr(generation, "_sequences", lambda *a: (calls.append(len(a[1])), own(*a))[1])
    found = windows(model, count=3)
    assert found.shape == (3, 24) and calls == [2, 2, 2, 2]  # 72 tokens are 8 sequences of 10


def test_the_cache_is_bounded(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, two heads of 16, keys and values in float32: 512 bytes a token."""
    monkeypatch.setattr(generation, "CACHE_BYTES", {"cpu": 512 * 24 * 5 + 1})
    assert generation.sequences_at_once(model, 24) == 5
    assert generation.sequences_at_once(model, 10**6) == 1
    monkeypatch.setattr(generation, "LARGE_MODEL_BYTES", 1e3)
    monkeypatch.setattr(generation, "CACHE_BESIDE_IT", 512 * 24 * 2)
    assert generation.sequences_at_once(model, 24) == 2


def test_windows_are_full_and_never_end_the_text(model: PreTrainedModel) -> None:
    found = windows(model)
    assert found.shape == (70, 24) and found.dtype == torch.int64 and found.device.type == "cpu"
    assert found.min() >= 0 and found.max() < 256
    assert (found[:, 1:] != 7).all()
    assert len(found[:, 0].unique()) > 30 and len(found[:, 1:].unique()) > 100


def test_a_seed_gives_the_same_windows_and_leaves_the_callers_random_numbers_alone(model: PreTrainedModel) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one = windows(model)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(windows(model), one) and not torch.equal(windows(model, seed=1), one)


def test_they_follow_the_model(model: PreTrainedModel) -> None:
    """The mean log-probability of what it samples is its own mean negative entropy, up to the sampling's noise."""
    found = windows(model)
    with torch.no_grad():
        logits = model(found).logits[:, :-1].log_softmax(dim=-1)
    logits = logits.clone()
    logits[..., 7] = -torch.inf
    logits = logits.log_softmax(dim=-1)
    drawn = logits.gather(-1, found[:, 1:, None])[..., 0]
    entropy = -(logits.exp() * logits.nan_to_num(neginf=0.0)).sum(dim=-1)
    spread = (drawn + entropy).std() / drawn.numel() ** 0.5
    assert abs(float((drawn + entropy).mean())) < 4 * float(spread)


def test_a_share_goes_on_from_the_text(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second sequence starts with five tokens that stand in the text; without a share nothing changes."""
    monkeypatch.setattr(generation, "PROMPT_TOKENS", 5)
    text = random_windows(3, 40)
    found = generated_windows(model, 70, 24, torch.Generator().manual_seed(0), text, Manner(prompted=0.5))
    pieces = {tuple(piece.tolist()) for window in text for piece in window.unfold(0, 5, 1)}
    prompted = [tuple(start.tolist()) in pieces for start in found[:, :5]]
    assert prompted == [True, False] * 35
    assert len({tuple(start.tolist()) for start in found[::2, :5]}) > 20
    assert torch.equal(found[1::2, 0], windows(model)[1::2, 0])  # the random tokens of the others
    assert torch.equal(
        generated_windows(model, 70, 24, torch.Generator().manual_seed(0), text, Manner(prompted=0.0)), windows(model)
    )
    assert (found[:, 5:] != 7).all()


def test_what_goes_on_from_a_text_follows_the_model(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt everywhere: the token after it has the model's own probabilities."""
    monkeypatch.setattr(generation, "PROMPT_TOKENS", 6)
    text = random_windows(1, 6)
    found = generated_windows(model, 4000, 12, torch.Generator().manual_seed(0), text, Manner(prompted=1.0))
    assert (found[:, :6] == text).all()
    with torch.no_grad():
        logits = model(text).logits[0, -1]
    logits[7] = -torch.inf
    probabilities = logits.softmax(dim=-1)
    counts = torch.bincount(found[:, 6], minlength=256)
    spread = (4000 * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - 4000 * probabilities).abs() <= 5 * spread + 1).all()


def test_calibration_takes_them_in(source: Path) -> None:
    given = random_windows(3, 24)
    result = pipeline.quantize(source, recipe("mxrot", calibration__generated=1.5), windows=given)
    assert result.record.windows == (7, 24)
    without = pipeline.quantize(source, recipe("mxrot", calibration__generated=0.0), windows=given)
    assert without.record.windows == (3, 24)


def test_a_negative_number_of_windows() -> None:
    with pytest.raises(ConfigError, match="generated must be finite and not negative"):
        recipe("mxrot", calibration__generated=-1.0)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"calibration__generated": 1.0}, "set calibration.generated = 0$"),
        (
            {"calibration__generated": 1.0, "tuning__scope": "network"},
            'set calibration.generated = 0 and tuning.scope = "block"$',
        ),
        ({"calibration__generated": 0.0, "tuning__scope": "network"}, 'set tuning.scope = "block"$'),
        (
            {"calibration__generated": 0.0, "tuning__scope": "network", "tuning__generated": 2.0},
            'set tuning.generated = 0 and tuning.scope = "block"$',
        ),
    ],
)
def test_a_model_that_does_not_fit_as_a_whole(
    source: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, float | str], remedy: str
) -> None:
    """It is said before a block is quantized, with what to set instead."""
    monkeypatch.setattr(pipeline, "room_here", lambda device, wanted: Room(("cpu",), (1000.0,), 1e9))
    with pytest.raises(ConfigError, match=rf"0\.0 GB (are free;|are available; give a text of your own, and) {remedy}"):
        pipeline.quantize(source, recipe("mxrot", **changes), windows=random_windows(3, 24))
