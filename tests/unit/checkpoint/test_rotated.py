"""Recipes that merge rotations: written, loaded, killed and gone on with, planned, and while a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import all_tensors, digests, logits, recipe, windows_for, without_run, write
from transformers import AutoModelForCausalLM

import mxrot
from mxrot.checkpoint.huggingface import MxrotConfig
from mxrot.errors import CheckpointError
from mxrot.planning import Machine, make_plan, rates
from mxrot.quantizing import quantize
from mxrot.recipe import Recipe

RECIPES = {
    "quarot": recipe("quarot"),
    "quarot-int4": recipe("quarot-int4"),
    "quarot-int4 to nearest": recipe("quarot-int4", rounding__method="rtn"),
    "spinquant": recipe("spinquant", rotation__steps=2),
    "spinquant-int4": recipe("spinquant-int4", rotation__steps=2),
    "rtn, orthogonal": recipe("rtn", rotation__residual="orthogonal", rotation__value_heads="orthogonal"),
    "mxrot": recipe("mxrot", rotation__residual="hadamard", calibration__generated=0.5),
}
recipes = pytest.mark.parametrize("chosen", RECIPES.values(), ids=RECIPES)
NEAREST = recipe("quarot", rounding__method="rtn")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tied", tie_word_embeddings=True, attention_bias=True)


@recipes
def test_what_is_loaded_is_what_was_quantized(tied: Path, tmp_path: Path, chosen: Recipe) -> None:
    in_memory = quantize(tied, chosen, windows=windows_for(chosen), seed=3).model
    assert in_memory is not None
    run = write(tied, tmp_path / "out", chosen, seed=3)
    assert [change.split(" by ")[0] for change in run["changes"]] == [
        "untied",
        *(["value heads rotated"] if chosen.rotation and chosen.rotation.value_heads != "none" else []),
        "rotated",
        *(["MLP permuted"] if chosen.permutation else []),
    ]
    expected = logits(in_memory)
    assert torch.equal(logits(mxrot.load(tmp_path / "out", device="cpu")), expected)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(by_transformers), expected)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    tensors = all_tensors(tmp_path / "out")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert "the residual stream (" in (tmp_path / "out/README.md").read_text()


def test_a_model_saved_from_memory_is_loaded_again(tied: Path, tmp_path: Path) -> None:
    model = mxrot.quantize(tied, NEAREST, device="cpu", progress=False)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_experts_are_rotated_too(tmp_path: Path) -> None:
    for kind in ("mixtral", "qwen3_moe"):
        source = write_tiny_mixture(tmp_path / kind, kind)
        in_memory = quantize(source, NEAREST).model
        assert in_memory is not None
        write(source, tmp_path / f"{kind} out", NEAREST)
        assert torch.equal(logits(mxrot.load(tmp_path / f"{kind} out", device="cpu")), logits(in_memory))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tied: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        write(tied, tmp_path / name, NEAREST, seed=seed)
    one, again, other = (without_run(digests(tmp_path / name)) for name in ("one", "again", "other"))
    assert one == again
    assert {name for name in one if one[name] != other[name]} >= {
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    }
    with pytest.raises(CheckpointError, match="another seed"):
        write(tied, tmp_path / "one", NEAREST, seed=1, resume=True)
    reversed_ = recipe("quarot", rounding__method="rtn", rotation__value_heads="orthogonal")
    with pytest.raises(CheckpointError, match="another recipe"):
        write(tied, tmp_path / "one", reversed_, resume=True)


@pytest.mark.parametrize("chosen", [RECIPES["quarot"], RECIPES["mxrot"]], ids=["quarot", "mxrot"])
def test_a_run_that_was_stopped_goes_on_with_the_same_matrices(tied: Path, tmp_path: Path, chosen: Recipe) -> None:
    def stop(done: float, total: int, what: str) -> None:
        if done == 1 and total == 2 and "order" not in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tied, tmp_path / "out", chosen, progress=stop)
    assert (tmp_path / "out.partial/block-00000.json").is_file()
    run = write(tied, tmp_path / "out", chosen, resume=True)
    straight = write(tied, tmp_path / "straight", chosen)
    assert without_run(digests(tmp_path / "out")) == without_run(digests(tmp_path / "straight"))
    assert run["changes"] == straight["changes"]


def test_the_plan_knows_the_head(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of the checkpoint is what is written; before, the head was the embedding."""
    monkeypatch.setattr(rates, "SECONDS", 0.0)
    run = write(tied, tmp_path / "out", NEAREST)
    plan = make_plan("tiny", tied, NEAREST, Machine(torch.device("cpu")))
    assert not plan.problems and plan.sizes is not None and plan.needs is not None
    assert plan.sizes.after.total_bytes == run["size"]["total_bytes"]
    stored = sum(tensor.nbytes for tensor in all_tensors(tied).values())
    assert plan.sizes.before == stored
    assert plan.needs.disk["the checkpoint"] == run["size"]["total_bytes"]


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_that_is_rotated_while_it_is_loaded(tmp_path: Path, is_tied: bool) -> None:
    source = write_tiny_model(tmp_path / "model", tie_word_embeddings=is_tied, attention_bias=True)
    options: dict[str, Any] = {"quantization_config": MxrotConfig(NEAREST), "dtype": torch.float16}
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    write(source, tmp_path / "out", NEAREST)
    written, found = all_tensors(tmp_path / "out"), model.state_dict()
    assert written.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float16)
    assert torch.equal(logits(again), logits(model))
