"""Models of which some tensors are stored in another type than most: each keeps its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cases.commands import logits
from tests.tiny_model import write_tiny_mixture, write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import mxrot

Tensors = dict[str, Tensor]


def tensors_of(folder: Path) -> Tensors:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def widen(folder: Path, is_wide: Callable[[str], bool], dtype: torch.dtype = torch.float32) -> Tensors:
    """Give some tensors more digits than the others hold; what the folder holds then."""
    found = load_file(folder / "model.safetensors")
    for name, value in found.items():
        if is_wide(name):
            found[name] = value.to(dtype) * (1 + 2.0**-12)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return found


@pytest.mark.case("B7")
@pytest.mark.parametrize("recipe", ["rtn", "hadamard", "smoothquant"])
@pytest.mark.parametrize("computed", ["float32", "as stored"])
def test_float32_norms_in_a_bfloat16_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, computed: str
) -> None:
    """In blocks and outside; computing in bfloat16, as on a GPU, too. Smoothing changes some of them."""
    if computed == "as stored":
        monkeypatch.setattr("mxrot.quantizing.run.compute_dtype", lambda stored, device: stored)
    folder = write_tiny_model(tmp_path / "tiny", dtype=torch.bfloat16)
    before = widen(folder, lambda name: "norm" in name)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    calib = {"calib": str(tmp_path / "text.txt"), "samples": 2, "seq_len": 32}
    mxrot.quantize(folder, recipe, tmp_path / "out", device="cpu", **calib)
    after = tensors_of(tmp_path / "out")
    for name, value in before.items():
        if name in after:
            assert after[name].dtype == value.dtype, name
            changed = recipe == "smoothquant" and "layers" in name
            assert changed or torch.equal(after[name], value), name
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(opened), logits(mxrot.load(tmp_path / "out", "cpu")))


@pytest.mark.case("B7")
@pytest.mark.parametrize("wide", ["model.embed_tokens", "lm_head", "self_attn.q_proj", "mlp.down_proj"])
def test_one_kind_of_tensor_in_float32(tmp_path: Path, wide: str) -> None:
    """What is not quantized keeps its type; what is, is rounded from all of its digits."""
    folder = write_tiny_model(tmp_path / "tiny", dtype=torch.bfloat16)
    before = widen(folder, lambda name: wide in name)
    recipe = mxrot.Recipe.from_toml('name = "left"\nignore = ["down_proj"]\n[weights]\nformat = "mxfp4"\n', "here")
    mxrot.quantize(folder, recipe, tmp_path / "out", device="cpu")
    after = tensors_of(tmp_path / "out")
    kept = [name for name in before if name in after]
    assert "model.layers.0.mlp.down_proj.weight" in kept
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in kept)


@pytest.mark.case("B7")
@pytest.mark.parametrize("fused", [False, True])
def test_a_float32_router_among_bfloat16_experts(tmp_path: Path, fused: bool) -> None:
    folder = write_tiny_mixture(tmp_path / "tiny", "qwen3_moe", torch.bfloat16, fused)
    before = widen(folder, lambda name: name.endswith("mlp.gate.weight"))
    mxrot.quantize(folder, "rtn", tmp_path / "out", device="cpu")
    after = tensors_of(tmp_path / "out")
    routers = [name for name in before if name.endswith("mlp.gate.weight")]
    assert routers and all(torch.equal(after[name], before[name]) for name in routers)
    assert {value.dtype for name, value in after.items() if "norm" in name} == {torch.bfloat16}


@pytest.mark.case("B7")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_model_of_one_type_stays_one(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_tiny_model(tmp_path / "tiny", dtype=dtype)
    mxrot.quantize(folder, "rtn", tmp_path / "out", device="cpu")
    found = {value.dtype for name, value in tensors_of(tmp_path / "out").items() if "proj" not in name}
    assert found == {dtype}


@pytest.mark.case("B7")
def test_a_router_under_an_older_name_keeps_bits_that_computing_does_not_hold(tmp_path: Path) -> None:
    """Mixtral's files call it block_sparse_moe.gate; float64, where a CPU computes in float32."""
    folder = write_tiny_mixture(tmp_path / "tiny", "mixtral", torch.bfloat16)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    exact = tensors[name].double() + 2.0**-40
    save_file(tensors | {name: exact}, path, {"format": "pt"})
    mxrot.quantize(folder, "rtn", tmp_path / "out", device="cpu")
    assert torch.equal(tensors_of(tmp_path / "out")["model.layers.0.mlp.gate.weight"], exact)
