"""What `save_pretrained` writes, into new folders and over old ones, is loaded again: C3."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.cases.commands import mxrot as command
from tests.cases.commands import refused
from tests.cases.transformers_models import from_pretrained, loaded, outputs, write_checkpoint
from torch import Tensor
from transformers import PreTrainedModel

import mxrot
from mxrot.errors import CheckpointError
from mxrot.recipe import load_recipe

SHARDS = "60KB"
"""A limit at which the tiny model takes several."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("saving") / "out")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return outputs(loaded(folder))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("All happy families are alike. " * 20)
    return path


def assert_loads(folder: Path, expected: Tensor) -> None:
    assert torch.equal(outputs(loaded(folder)), expected)
    assert torch.equal(outputs(from_pretrained(folder)), expected)


def quantized(folder: Path) -> PreTrainedModel:
    """The same model from memory."""
    recipe = load_recipe("hadamard").changed({"transform.sharing": "block"})
    model = mxrot.quantize(folder.with_name("out-source"), recipe, device="cpu")
    assert isinstance(model, PreTrainedModel)
    return model


def prepared(folder: Path) -> PreTrainedModel:
    return loaded(folder, is_prepared=True)


@pytest.mark.case("C3")
@pytest.mark.parametrize("limit", ["50GB", SHARDS])
@pytest.mark.parametrize("make", [loaded, from_pretrained, prepared, quantized])
def test_saved_into_a_new_folder(
    folder: Path, expected: Tensor, tmp_path: Path, make: Callable[[Path], PreTrainedModel], limit: str
) -> None:
    make(folder).save_pretrained(tmp_path / "new", max_shard_size=limit)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == 1 or limit == SHARDS
    assert_loads(tmp_path / "new", expected)


@pytest.mark.case("C3")
@pytest.mark.parametrize("limit", ["50GB", SHARDS])
@pytest.mark.parametrize("make", [loaded, from_pretrained])
def test_saved_over_its_own_folder(
    folder: Path, expected: Tensor, tmp_path: Path, text: Path, make: Callable[[Path], PreTrainedModel], limit: str
) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    model = make(own)
    for _ in range(2):
        model.save_pretrained(own, max_shard_size=limit)
        assert_loads(own, expected)
        model = make(own)
    scored = command("eval", own, "--text", text, "--seq-len", "32", "--windows", "2", "--device", "cpu")
    assert scored.exit_code == 0, scored.output


@pytest.mark.case("C3")
@pytest.mark.parametrize("limit", ["50GB", SHARDS])
@pytest.mark.parametrize("recipe", ["rtn", "hadamard"])
def test_saved_over_the_folder_of_another_model(
    folder: Path, expected: Tensor, tmp_path: Path, recipe: str, limit: str
) -> None:
    """Its run.json and recipe.toml stay, and say nothing of what is there now."""
    mxrot.quantize(write_source(tmp_path, seed=1), recipe, tmp_path / "other")
    loaded(folder).save_pretrained(tmp_path / "other", max_shard_size=limit)
    assert_loads(tmp_path / "other", expected)


def write_source(folder: Path, seed: int) -> Path:
    """Another model of the same shapes."""
    write_checkpoint(folder / "unused", seed=seed)
    return folder / "unused-source"


@pytest.mark.case("C3")
def test_a_changed_model_saved_over_its_own_folder_is_the_changed_one(folder: Path, tmp_path: Path) -> None:
    """Same names, same sizes, other values: only what tells who wrote them last tells them apart."""
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    model = loaded(own)
    model.model.norm.weight.data.mul_(2)
    expected = outputs(model)
    model.save_pretrained(own, max_shard_size=SHARDS)
    assert_loads(own, expected)


@pytest.mark.case("C3")
@pytest.mark.parametrize("limits", [(SHARDS, "50GB"), (SHARDS, "30KB"), ("30KB", SHARDS)], ids=str)
def test_saved_again_in_fewer_or_more_files(folder: Path, tmp_path: Path, limits: tuple[str, str]) -> None:
    model = loaded(folder)
    for limit in limits:
        model.model.norm.weight.data.mul_(2)
        model.save_pretrained(tmp_path / "new", max_shard_size=limit)
    assert_loads(tmp_path / "new", outputs(model))


@pytest.mark.case("C3")
def test_one_file_and_then_several_leaves_both_and_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers leaves the one file there, and would read it."""
    model = loaded(folder)
    model.save_pretrained(tmp_path / "new")
    model.model.norm.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "new", max_shard_size=SHARDS)
    for load in (loaded, from_pretrained):
        with pytest.raises(CheckpointError, match="holds two models") as raised:
            load(tmp_path / "new")
        assert "\n" not in str(raised.value)
    (tmp_path / "new" / "model.safetensors").unlink()
    assert_loads(tmp_path / "new", outputs(model))


@pytest.mark.case("C3")
def test_a_half_precision_copy_is_saved_with_its_codes(folder: Path, tmp_path: Path) -> None:
    loaded(folder).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = mxrot.load(tmp_path / "half", device="cpu", dtype=torch.bfloat16)
    assert torch.equal(outputs(half), outputs(from_pretrained(tmp_path / "half", dtype=torch.bfloat16)))
    assert half.state_dict()["model.layers.0.mlp.down_proj.layer0_down_input.weight"].dtype == torch.bfloat16


@pytest.mark.case("C3")
def test_commands_do_not_tell_of_what_was_there_before(folder: Path, tmp_path: Path, text: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    loaded(own).save_pretrained(own)
    short = ("--text", text, "--seq-len", "32", "--windows", "2", "--device", "cpu")
    card = (own / "README.md").read_text()
    assert "before save_pretrained;" in refused("report", own, "--card", *short)
    assert (own / "README.md").read_text() == card
    assert "holds no hashes of these files" in refused("eval", own, "--verify", *short)
    assert "Relative error" in command("inspect", folder, *short).stdout
    inspected = command("inspect", own, *short)
    assert inspected.exit_code == 0 and "Relative error" not in inspected.stdout
