"""Rotations that are learned before a model is quantized: what training sees, what is kept of it, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config, write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import digests, logits, recipe, without_run, write
from tests.unit.surgery.changed_sources import off_by

from mxrot.checkpoint import load
from mxrot.errors import ConfigError
from mxrot.layers import build_apart, logits_of
from mxrot.models import FAMILIES, FolderSource
from mxrot.quantizing import quantize
from mxrot.quantizing.loading import load_original
from mxrot.quantizing.problems import find_problems
from mxrot.quantizing.rotating import drawn_rotations
from mxrot.rules import Rules
from mxrot.scheme import Scheme, install_attention
from mxrot.tuning import RotatedNetwork, rotations, trained_sites

WINDOWS = random_windows(6, 24)
CHANGES: dict[str, Any] = {"rotation__steps": 4, "rotation__batch_windows": 3}
NAMES = pytest.mark.parametrize("name", ["spinquant", "spinquant-int4", "spinquant-kv4", "spinquant-int4-kv4"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), torch.float32, tie_word_embeddings=True, head_dim=32)


@NAMES
def test_training_sees_the_model_that_is_quantized(source: Path, name: str) -> None:
    """Rounded to nearest under the matrices that training starts from: the same but for the float32 sums of the one, a
    hundred roundings of 2**-24, where none of them moves a number over the middle between two codes. In float64,
    because a row of weights may have two clips that are as good as each other."""
    chosen = recipe(name, rounding__method="rtn", rotation__quantized_weights=True, rotation__steps=0)
    found = quantize(source, chosen, windows=WINDOWS).model
    assert found is not None
    folder = FolderSource(source)
    start = drawn_rotations(folder.config, chosen, 0, "cpu")
    model = load_original(folder, torch.float64, torch.device("cpu"), separates_experts=True)
    with torch.no_grad():
        plain = model(WINDOWS).logits
    install_attention(model, Scheme.of(chosen, folder.family, build_apart(folder.config)), folder.family)
    rules = Rules(chosen, folder.family, folder.config.num_hidden_layers)
    sites = [trained_sites(rules, index, block, 0) for index, block in enumerate(model.model.layers)]
    network = RotatedNetwork.of(model, folder.family, WINDOWS, sites, len(WINDOWS), torch.float64)
    with network.open(), torch.no_grad():
        states = network.states(WINDOWS, start.residual, start.value_heads)
        expected = logits_of(model, states)
    with torch.no_grad():
        deployed = found(WINDOWS).logits
    assert off_by(deployed, expected) < 1e-5
    assert off_by(plain, expected) > 0.01  # else the bound would say nothing


@NAMES
def test_a_trained_checkpoint_loads_as_it_was_made(source: Path, tmp_path: Path, name: str) -> None:
    chosen = recipe(name, **CHANGES)
    result = quantize(source, chosen, windows=WINDOWS)
    losses = result.record.rotation_losses
    assert result.model is not None and losses is not None and len(losses) == 4
    run = write(source, tmp_path / "out", chosen, windows=WINDOWS)
    assert torch.equal(logits(load(tmp_path / "out")), logits(result.model))
    assert run["rotation_losses"] == losses
    drawn = quantize(source, recipe(name, rotation__steps=0), windows=WINDOWS)
    assert drawn.record.rotation_losses is None and drawn.source.changes != result.source.changes


@pytest.mark.parametrize("name", ["spinquant-kv4", "spinquant-int4-kv4"])
def test_training_sees_the_cache(source: Path, name: str) -> None:
    """Other losses than without one, from the first step on, and other matrices."""
    chosen = recipe(name, **CHANGES)
    losses = []
    for one in (chosen, chosen.changed({"cache": "none"})):
        found = quantize(source, one, windows=WINDOWS).record.rotation_losses
        assert found is not None
        losses.append(found)
    assert all(a != b for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize("at", [2, 4])
def test_a_killed_run_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """In the middle of training, and behind it: nothing that was learned is learned again."""
    monkeypatch.setattr(rotations, "KEEP_SECONDS", 0.0)
    chosen = recipe("spinquant-kv4", **CHANGES)
    whole = write(source, tmp_path / "whole", chosen, windows=WINDOWS)

    def kill(done: float, total: int, what: str) -> None:
        if what.startswith("training rotations") and done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "killed", chosen, windows=WINDOWS, resume=True, progress=kill)
    assert "rotations.safetensors" in {path.name for path in (tmp_path / "killed.partial").iterdir()}
    told: list[tuple[float, int]] = []

    def note(done: float, total: int, what: str) -> None:
        if what.startswith("training rotations"):
            told.append((done, total))

    run = write(source, tmp_path / "killed", chosen, windows=WINDOWS, resume=True, progress=note)
    assert without_run(digests(tmp_path / "killed")) == without_run(digests(tmp_path / "whole"))
    assert run["rotation_losses"] == whole["rotation_losses"]
    assert told == [(float(step), 4) for step in range(at, 5) if at < 4]


def test_seeds_and_both_kinds_of_training_give_other_matrices(source: Path) -> None:
    def changes(seed: int = 0, **more: Any) -> tuple[str, ...]:
        chosen = recipe("spinquant", rounding__method="rtn", **CHANGES | {"rotation__steps": 2} | more)
        return quantize(source, chosen, windows=WINDOWS, seed=seed).source.changes

    assert changes() == changes()
    found = [changes(), changes(seed=1), changes(rotation__quantized_weights=True), changes(rotation__rate=0.1)]
    assert len(set(found)) == 4


def test_experts_are_rotated_too(tmp_path: Path) -> None:
    mixture = write_tiny_mixture(tmp_path / "mixture", "mixtral", torch.float32)
    result = quantize(mixture, recipe("spinquant", rounding__method="rtn", **CHANGES), windows=WINDOWS)
    assert result.record.rotation_losses is not None and len(result.record.rotation_losses) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoothing.alpha": 0.5}, r"rotation.steps = 100: training cannot know the smoothing scales, .*\[smoothing\]"),
        (
            {"transform.method": "moments"},
            r"rotation.steps = 100: training cannot know transform 'moments', .* such as hadamard, or set",
        ),
        ({"activations": "none", "override": "none"}, r"nothing is quantized that training could see; set rotation.qu"),
    ],
    ids=["smoothing", "moments", "W16A16"],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], message: str) -> None:
    """Before any weight is read; without training it may be done."""
    chosen = recipe("spinquant").changed(changes)

    def problems(steps: int) -> list[str]:
        changed = chosen.changed({"rotation.steps": steps})
        skeleton = build_apart(tiny_config())
        return [str(one) for one in find_problems(skeleton, FAMILIES["llama"], changed, "here")]

    (found,) = problems(100)
    assert re.search(message, found)
    assert problems(0) == []


def test_training_needs_text(source: Path) -> None:
    chosen = recipe("spinquant", rounding__method="rtn", **CHANGES)
    assert not chosen.is_data_free and chosen.runs_whole_original
    with pytest.raises(ConfigError, match="needs calibration text"):
        quantize(source, chosen)
    assert recipe("spinquant", rounding__method="rtn", rotation__steps=0).is_data_free
