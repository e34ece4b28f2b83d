"""A model is read piece by piece, and what is read can be changed on the way."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_model import write_tiny_mixture, write_tiny_model
from torch import Tensor

from mxrot.errors import FamilyError
from mxrot.layers import build_apart
from mxrot.models import ChangedSource, FolderSource, build_skeleton

PREFIX = "model.layers.1."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def test_a_folder_is_read_piece_by_piece(folder: Path) -> None:
    source, stored = FolderSource(folder), load_file(folder / "model.safetensors")
    pieces = source.outer()
    assert pieces.keys() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for index in range(2):
        pieces |= {f"model.layers.{index}.{name}": tensor for name, tensor in source.block(index).items()}
    assert pieces.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) and tensor.dtype == torch.float16 for name, tensor in pieces.items())
    assert (source.dtype, source.types, source.changes, dict(source.config_changes)) == (torch.float16, {}, (), {})
    assert (source.name, source.family.name, source.folder) == (str(folder), "llama", folder)
    source.prefetch(1)
    source.prefetch(2)  # which is not there


def test_block_one_of_twelve_is_not_block_ten(tmp_path: Path) -> None:
    source = FolderSource(write_tiny_model(tmp_path / "deep", num_hidden_layers=12))
    block = source.block(1)
    assert len(block) == 9
    assert torch.equal(block["mlp.down_proj.weight"], source.files.read(f"{PREFIX}mlp.down_proj.weight"))


@pytest.mark.parametrize("fused", [False, True])
def test_some_names_of_a_block(tmp_path: Path, fused: bool) -> None:
    """Also where a file has one tensor for all experts; and only what holds them is read."""
    source = FolderSource(write_tiny_mixture(tmp_path / "tiny", "qwen3_moe", fused=fused))
    wanted = {"mlp.experts.2.up_proj.weight", "input_layernorm.weight", "no.such.weight"}
    read: list[str] = []
    whole, read_all = source.block(1), source.files.read_all

    def noting(names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        read.extend(names)
        return read_all(names, device)

    source.files.read_all = noting  # type: ignore[method-assign]
    found = source.block(1, "cpu", wanted)
    assert found.keys() == wanted - {"no.such.weight"}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
    assert len(read) == 2
    assert source.block(1, "cpu", set()) == {}


def test_what_is_missing_is_told_by_the_skeleton(folder: Path) -> None:
    source = FolderSource(folder)
    assert not list(source.problems(build_skeleton(source.config)))
    source.config.hidden_size = 128
    (problem,) = source.problems(build_apart(source.config))
    assert "tensors do not fit the config" in str(problem)


def test_a_folder_of_no_family_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "BertForMaskedLM"))
    with pytest.raises(FamilyError, match=r"^mine: architectures BertForMaskedLM: not a causal language model"):
        FolderSource(folder, "mine")


class Doubled(ChangedSource):
    """Norm gains twice as large."""

    def changed_outer(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: 2 * tensor if "norm" in name else tensor for name, tensor in tensors.items()}

    def changed_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: 4 * tensor if "norm" in name else tensor for name, tensor in tensors.items()}


def test_a_changed_source_differs_in_what_it_says(folder: Path) -> None:
    inner = FolderSource(folder, "mine")
    source = Doubled(Doubled(inner, "doubled"), "doubled again")
    assert source.changes == ("doubled", "doubled again") and source.name == "mine" and source.config is inner.config
    assert torch.equal(source.outer()["model.norm.weight"], 4 * inner.outer()["model.norm.weight"])
    assert torch.equal(source.outer()["lm_head.weight"], inner.outer()["lm_head.weight"])
    norm = "input_layernorm.weight"
    assert torch.equal(source.block(1)[norm], 16 * inner.block(1)[norm])
    assert source.block(1, "cpu", {norm}).keys() == {norm}
    assert (source.dtype, source.types) == (inner.dtype, inner.types)
    assert not list(source.problems(build_skeleton(source.config)))
