"""A checkpoint that is read back is the model that was quantized, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import all_tensors, logits, recipe, windows_for, write

from mxrot.checkpoint import load
from mxrot.errors import FamilyError
from mxrot.layers import QuantLinear
from mxrot.quantizing.run import quantize
from mxrot.recipe import Recipe

RECIPES = {
    "rtn": recipe("rtn"),
    "smoothquant": recipe("smoothquant"),
    "hadamard": recipe("hadamard"),
    "duquant++": recipe("duquant++"),
    "duquant++ block": recipe("duquant++", transform__sharing="block"),
    "duquant++-gptq": recipe("duquant++-gptq"),
    "duquant": recipe("duquant"),
    "duquant block": recipe("duquant", transform__sharing="block"),
    "duquant-mxfp4": recipe("duquant-mxfp4"),
    "rtn-int4": recipe("rtn-int4"),
}
recipes = pytest.mark.parametrize("chosen", RECIPES.values(), ids=RECIPES)


def assert_reload_is_exact(source: Path, output: Path, chosen: Recipe) -> None:
    kept = quantize(source, chosen, windows=windows_for(chosen)).model
    assert kept is not None
    write(source, output, chosen)
    loaded = load(output, verify=True)
    expected, found = kept.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.dtype == found[name].dtype, name
        assert torch.equal(value, found[name]), name
    assert torch.equal(logits(kept), logits(loaded))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(parameter.is_meta for parameter in loaded.parameters())


@recipes
@pytest.mark.parametrize("tied_with_biases", [False, True], ids=["plain", "tied-biases"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_logits_are_the_same_bits(tmp_path: Path, dtype: torch.dtype, tied_with_biases: bool, chosen: Recipe) -> None:
    changes = {name: tied_with_biases for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
    source = write_tiny_model(tmp_path / "source", dtype, **changes)
    assert_reload_is_exact(source, tmp_path / "out", chosen)
    tensors = all_tensors(tmp_path / "out")
    assert ("lm_head.weight" in tensors) is not tied_with_biases
    assert ("model.layers.1.mlp.down_proj.bias" in tensors) is tied_with_biases
    parts = (".weight_packed", ".weight_scale", ".weight_zero_point", "_input.weight", "_input.order")
    assert all(value.dtype == dtype for name, value in tensors.items() if not any(part in name for part in parts))


@recipes
@pytest.mark.parametrize("ignore", [["down_proj"], ["q_proj", "up_proj"], ["model.layers.0.*"]], ids=str)
def test_with_ignored_linears(source: Path, tmp_path: Path, ignore: list[str], chosen: Recipe) -> None:
    assert_reload_is_exact(source, tmp_path / "out", chosen.changed({"ignore": ignore}))


@recipes
def test_a_norm_of_another_type_is_the_same_after_reload(tmp_path: Path, chosen: Recipe) -> None:
    """float32 norms in a bfloat16 model: they keep their type."""
    source = write_tiny_model(tmp_path / "source", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if value.dim() == 1:
            tensors[name] = torch.rand(value.shape, generator=generator) + 0.5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_reload_is_exact(source, tmp_path / "out", chosen)


def test_a_head_of_its_own_in_a_tied_model_is_refused_until_the_config_says_so(tmp_path: Path) -> None:
    """transformers keeps both, others tie them: with the config as it is, one folder would be two models."""
    source = write_tiny_model(tmp_path / "source", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FamilyError, match=r"lm_head\.weight differs from .* set that to false to keep both"):
        write(source, tmp_path / "refused", recipe("rtn"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert_reload_is_exact(source, tmp_path / "out", recipe("rtn"))
    assert torch.equal(load(tmp_path / "out").lm_head.weight, tensors["lm_head.weight"].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtype_is_that_of_what_is_not_quantized(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    write(source, tmp_path / "out", recipe("hadamard"))
    model = load(tmp_path / "out", dtype=dtype)
    assert model.get_parameter("model.norm.weight").dtype == dtype
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(linear, QuantLinear) and linear.weight_packed.dtype == torch.uint8
    assert linear.transform is not None and linear.transform.weight.dtype == torch.bfloat16
    assert logits(model).dtype == dtype


@recipes
def test_ignored_linears_are_left_as_they_are(source: Path, tmp_path: Path, chosen: Recipe) -> None:
    """A whole site that is ignored takes no smoothing scales either."""
    write(source, tmp_path / "out", chosen.changed({"ignore": ["down_proj", "model.layers.1.*"]}))
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    left = [name for name in before if ".layers.1." in name or "down_proj" in name or ".layers." not in name]
    assert len(left) == 9 + 1 + 3
    for name in left:
        assert torch.equal(before[name], after[name]), name
    assert "model.layers.0.mlp.up_proj.weight_packed" in after


def test_the_generation_config_comes_along(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    (source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    kept = quantize(source, recipe("rtn")).model
    write(source, tmp_path / "out", recipe("rtn"))
    assert kept is not None and kept.generation_config is not None
    loaded = load(tmp_path / "out").generation_config
    assert loaded is not None
    assert kept.generation_config.max_new_tokens == loaded.max_new_tokens == 7
