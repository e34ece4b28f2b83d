"""Transforms that are fitted once more behind codes: errors, what is stored, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import all_tensors, logits, recipe, write

from mxrot.checkpoint import load
from mxrot.errors import ConfigError
from mxrot.quantizing import run as pipeline

WINDOWS = random_windows(12, 32)
SHORT = {"calibration__generated": 0.0, "rounding__target": "own"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("sharing", ["site", "block"])
def test_outputs_of_the_first_site_are_closer_with_the_same_codes(source: Path, sharing: str) -> None:
    """Later sites are rounded behind other inputs."""
    changes = SHORT | {"transform__sharing": sharing}
    plain = pipeline.quantize(source, recipe("mxrot", **changes), windows=WINDOWS)
    chosen = recipe("mxrot", **changes, refit__damping=0.001)
    again = pipeline.quantize(source, chosen, windows=WINDOWS)
    assert plain.model is not None and again.model is not None
    one, two = (found.model.model.layers[0].self_attn.q_proj for found in (plain, again))
    assert torch.equal(one.weight_packed, two.weight_packed)
    assert not torch.equal(one.transform.weight, two.transform.weight)
    before, after = (
        sum(linear.output_error**2 for linear in found.record.blocks[0].linears[:3]) for found in (plain, again)
    )
    assert after < before


def test_what_is_stored_is_what_was_refitted(source: Path, tmp_path: Path) -> None:
    chosen = recipe("mxrot", calibration__generated=0.0, refit__damping=0.01)
    write(source, tmp_path / "out", chosen, windows=WINDOWS)
    model = pipeline.quantize(source, chosen, windows=WINDOWS).model
    assert model is not None and torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_strong_damping_leaves_transforms_as_they_are(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "plain", recipe("mxrot", **SHORT), windows=WINDOWS)
    write(source, tmp_path / "held", recipe("mxrot", **SHORT, refit__damping=1e9), windows=WINDOWS)
    plain, held = all_tensors(tmp_path / "plain"), all_tensors(tmp_path / "held")
    assert plain.keys() == held.keys() and all(torch.equal(plain[name], held[name]) for name in plain)


def test_transforms_inside_experts_stay(tmp_path: Path) -> None:
    folder = write_tiny_mixture(tmp_path / "mixture", "mixtral")
    chosen = recipe("mxrot", **SHORT, refit__damping=0.001)
    assert pipeline.quantize(folder, chosen, windows=WINDOWS).model is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refit.damping": 0.0}, "refit: damping must be positive and finite, got 0.0"),
        ({"refit.damping": 0.1, "rounding.method": "rtn"}, "rounding rtn looks at none; set"),
    ],
)
def test_what_cannot_be_refitted(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        recipe("mxrot").changed(changes)
    assert message in str(raised.value)
