"""The tensors of a folder against those of its config, by headers alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import write_tiny_mixture, write_tiny_model
from torch import Tensor

from mxrot.errors import FamilyError
from mxrot.layers import build_apart
from mxrot.models import (
    WeightFiles,
    build_skeleton,
    check_depth,
    check_for_transformers,
    find_family,
    other_types,
    read_config,
    tensor_problems,
)


def problems(folder: Path, experts_apart: bool = True) -> list[str]:
    config = read_config(folder)
    family = find_family(config, "here")
    model = (build_apart if experts_apart else build_skeleton)(config)
    return [str(problem) for problem in tensor_problems(WeightFiles(folder), model, family)]


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_has_none(tmp_path: Path, tied: bool) -> None:
    assert problems(write_tiny_model(tmp_path, tie_word_embeddings=tied)) == []


@pytest.mark.parametrize("experts_apart", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_told_apart(tmp_path: Path, kind: str, fused: bool, experts_apart: bool) -> None:
    folder = write_tiny_mixture(tmp_path, kind, fused=fused)
    assert problems(folder, experts_apart) == []
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in sorted(tensors) if "experts" in name)
    del tensors[gone]
    rewrite(folder, tensors)
    (found,) = problems(folder, experts_apart)
    assert "got no model.layers.0.mlp.experts.0." in found


def test_one_for_each_kind(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for index in range(2):
        del tensors[f"model.layers.{index}.mlp.up_proj.weight"]
        tensors[f"model.layers.{index}.mlp.w1.weight"] = torch.ones(2)
        tensors[f"model.layers.{index}.input_layernorm.weight"] = torch.ones(63)
    rewrite(folder, tensors)
    missing, extra, odd = problems(folder)
    assert (
        "got no model.layers.0.mlp.up_proj.weight (and 1 more); the files hold model.layers.0.mlp.w1.weight" in missing
    )
    assert extra.startswith("model.layers.0.mlp.w1.weight: ") and "(and 1 more)" in extra
    assert "expected model.layers.0.input_layernorm.weight [64], got" in odd and "[63] (and 1 more)" in odd


def test_the_number_of_blocks(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config, files = read_config(folder), WeightFiles(folder)
    check_depth(files, find_family(config, "here"), config)
    for blocks in (1, 3, 1000):
        config.num_hidden_layers = blocks
        with pytest.raises(FamilyError, match=rf"num_hidden_layers {blocks}, and the files hold 2 decoder blocks"):
            check_depth(files, find_family(config, "here"), config)


def test_other_types(tmp_path: Path) -> None:
    folder = write_tiny_mixture(tmp_path, "qwen3_moe", torch.bfloat16, fused=True)
    family = find_family(read_config(folder), "here")
    assert other_types(WeightFiles(folder), family, torch.bfloat16) == {}
    tensors = load_file(folder / "model.safetensors")
    wide = ["model.norm.weight", "model.layers.1.mlp.experts.down_proj"]
    rewrite(folder, tensors | {name: tensors[name].float() for name in wide})
    files = WeightFiles(folder)
    assert files.dtype_of_most() == torch.bfloat16
    downs = [f"model.layers.1.mlp.experts.{number}.down_proj.weight" for number in range(4)]
    assert other_types(files, family, torch.bfloat16) == dict.fromkeys([wide[0], *downs], torch.float32)


def test_what_transformers_will_find(tmp_path: Path) -> None:
    """It knows names without `model.`, and no other prefix."""
    folder = write_tiny_model(tmp_path)
    config = read_config(folder)
    model, family = build_skeleton(config), find_family(config, "here")
    tensors, files = load_file(folder / "model.safetensors"), [str(folder / "model.safetensors")]
    rewrite(folder, {name.removeprefix("model."): value for name, value in tensors.items()})
    check_for_transformers(model, family, files)
    rewrite(folder, {f"module.{name}": value for name, value in tensors.items()})
    with pytest.raises(FamilyError, match=r"transformers does not know module\.lm_head\.weight for lm_head\.weight"):
        check_for_transformers(model, family, files)
    check_for_transformers(model, family, [])
    check_for_transformers(model, family, [str(folder / "model.fp16.safetensors")])
