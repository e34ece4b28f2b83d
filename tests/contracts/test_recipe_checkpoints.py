"""Every recipe that comes with mxrot: what is written is loaded again, by mxrot and by transformers, as it was made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import TOKENS, logits, recipe, write
from transformers import AutoModelForCausalLM

from mxrot import quantizing
from mxrot.checkpoint import load
from mxrot.errors import ConfigError
from mxrot.recipe import Recipe, builtin_recipes

WINDOWS = random_windows(6, 24)
IN_MEMORY_ONLY = [name for name in builtin_recipes() if "released" in name]
WRITTEN = [name for name in builtin_recipes() if name not in IN_MEMORY_ONLY]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs are multiples of 128, for transforms of that block."""
    folder = tmp_path_factory.mktemp("wide") / "source"
    return write_tiny_model(folder, hidden_size=128, intermediate_size=128, head_dim=32)


def short(name: str) -> Recipe:
    """With a short search, little tuning and no text that the model writes."""
    chosen = recipe(name)
    if hasattr(chosen.transform, "steps"):
        chosen = chosen.changed({"transform.steps": 8})
    if chosen.calibration.generated:
        chosen = chosen.changed({"calibration.generated": 0.0})
    if chosen.rotation is not None and chosen.rotation.steps:
        chosen = chosen.changed({"rotation.steps": 2})
    if chosen.tuning is not None:
        chosen = chosen.changed({"tuning.steps": 2, "tuning.generated": 0.0, "tuning.held_out": 0.2})
    return chosen


@pytest.mark.parametrize("name", WRITTEN)
def test_it_is_loaded_as_it_was_made(source: Path, tmp_path: Path, name: str) -> None:
    chosen = short(name)
    windows = None if chosen.is_data_free else WINDOWS
    made = quantizing.quantize(source, chosen, windows=windows).model
    assert made is not None
    expected = logits(made)
    write(source, tmp_path / "out", chosen, windows=windows)
    ours = load(tmp_path / "out", verify=True)
    assert torch.equal(logits(ours), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(theirs), expected)
    for model in (ours, theirs) if chosen.cache is not None else ():
        options: Any = {"max_new_tokens": 6, "do_sample": False}
        cached = model.generate(TOKENS, **options)
        assert torch.equal(cached, model.generate(TOKENS, **options, use_cache=False))


@pytest.mark.parametrize("name", IN_MEMORY_ONLY)
def test_scales_that_no_file_can_hold_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be exported; use `compare`, which keeps the model in memory"):
        write(source, tmp_path / "out", recipe(name))
