"""A source whose weights are changed on the way in, from its files to a checkpoint and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import recipe
from tests.unit.surgery.changed_sources import rotation
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import mxrot
from mxrot.checkpoint import quantize_to_folder
from mxrot.errors import CheckpointError
from mxrot.models import FolderSource, Source
from mxrot.quantizing import quantize
from mxrot.surgery import PermutedFfn, Rotated, Untied

WINDOWS = random_windows(4, 24)
ORDER = torch.randperm(96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tied(tmp_path: Path) -> FolderSource:
    return FolderSource(write_tiny_model(tmp_path / "tied", tie_word_embeddings=True))


def changed(source: Source) -> Source:
    return PermutedFfn(Rotated(Untied(source), rotation()), {"model.layers.0.mlp.down_proj": ORDER})


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(WINDOWS).logits
    return found


@pytest.mark.parametrize("name", ["rtn", "mxrot"])
def test_what_is_loaded_is_what_was_quantized(tied: FolderSource, tmp_path: Path, name: str) -> None:
    """`mxrot` writes text with the original, calibrates, and looks at the original beside: all of the same source."""
    chosen = recipe(name, **({"calibration__generated": 0.5} if name == "mxrot" else {}))
    windows = None if chosen.is_data_free else WINDOWS
    in_memory = quantize(changed(tied), chosen, windows=windows).model
    assert in_memory is not None
    run = quantize_to_folder(changed(tied), chosen, tmp_path / "out", base_name="tiny", windows=windows)
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(loaded), logits(in_memory))
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(by_transformers), logits(in_memory))
    own = list(changed(tied).changes)
    assert run["changes"][: len(own)] == own and len(own) == 3
    assert [said.partition(" by ")[0] for said in run["changes"][3:]] == ["MLP permuted"] * (name == "mxrot")


def test_the_folder_holds_the_tensors_and_the_config_of_the_source(tied: FolderSource, tmp_path: Path) -> None:
    source = changed(tied)
    quantize_to_folder(source, recipe("rtn"), tmp_path / "out", base_name="tiny")
    stored: dict[str, Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
    outer = source.outer()
    assert outer.keys() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(torch.equal(stored[name], tensor) for name, tensor in outer.items())
    norm = stored["model.layers.0.input_layernorm.weight"]
    assert norm.dtype == torch.float16 and (norm == 1).all()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert json.loads((tied.folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_source_that_nothing_changes_gives_the_files_of_its_folder(tied: FolderSource, tmp_path: Path) -> None:
    for name, source in (("one", tied), ("other", tied.folder)):
        quantize_to_folder(source, recipe("rtn"), tmp_path / name, base_name="tiny")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "other").iterdir())
    for file in set(files) - {"run.json"}:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_a_run_is_not_resumed_with_another_change(tied: FolderSource, tmp_path: Path) -> None:
    untied = Untied(tied)
    one, other = (Rotated(untied, rotation(seed=seed)) for seed in range(2))
    options = {"base_name": "tiny", "resume": True}
    run = quantize_to_folder(one, recipe("rtn"), tmp_path / "out", **options)
    assert quantize_to_folder(one, recipe("rtn"), tmp_path / "out", **options)["fingerprint"] == run["fingerprint"]
    for source in (other, untied, tied):
        with pytest.raises(CheckpointError, match=r"was made by a run with another model \(.*rotated by"):
            quantize_to_folder(source, recipe("rtn"), tmp_path / "out", **options)


def test_orders_that_a_recipe_finds_are_in_the_weights_alone(tied: FolderSource, tmp_path: Path) -> None:
    """Written and loaded it is the model that was quantized, with nothing to permute at run time."""
    keys = {"transform__block": 8, "permutation__ffn": "correlated", "permutation__value_heads": "balanced"}
    chosen = recipe("mxrot", calibration__generated=0.0, **keys)
    in_memory = quantize(tied, chosen, windows=WINDOWS).model
    assert in_memory is not None
    run = quantize_to_folder(tied, chosen, tmp_path / "out", base_name="tiny", windows=WINDOWS)
    kinds = [change.partition(" by ")[0] for change in run["changes"]]
    assert kinds == ["MLP permuted", "value heads permuted"]
    assert torch.equal(logits(mxrot.load(tmp_path / "out", device="cpu")), logits(in_memory))
    plain = recipe("mxrot", calibration__generated=0.0, transform__block=8)
    quantize_to_folder(tied, plain, tmp_path / "plain", base_name="tiny", windows=WINDOWS)
    found, expected = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("out", "plain"))
    assert found.keys() == expected.keys()
    assert [one.shape for one in found.values()] == [expected[name].shape for name in found]
