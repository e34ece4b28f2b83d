"""Checkpoints through transformers' own from_pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import TOKENS, logits, recipe, write
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.quantizers import auto

import mxrot
from mxrot import autoload
from mxrot.checkpoint.huggingface import CheckpointConfig
from mxrot.errors import CheckpointError, ConfigError
from mxrot.layers import QuantLinear
from mxrot.recipe import load_recipe

RECIPES = {
    "mxrot": {"calibration__generated": 0.0},
    "mxrot-vllm": {"calibration__generated": 0.0},
    "hadamard": {"transform__sharing": "block"},
    "rtn": {"activations": "none"},
    "duquant++": {"ignore": ["o_proj", "model.layers.0.mlp.down_proj"]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=RECIPES)
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("quantized") / request.param
    write(source, path, recipe(request.param, **RECIPES[request.param]))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_from_pretrained_gives_the_same_logits_as_load(folder: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert torch.equal(logits(model), logits(mxrot.load(folder, dtype=dtype, device="cpu")))
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert model.dtype == dtype


def test_what_is_saved_again_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    first, second = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    second["quantization_config"]["mxrot"].pop("saved_by")
    assert second["quantization_config"] == first["quantization_config"]


def test_a_loaded_model_can_be_saved_by_transformers_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    model = mxrot.load(folder, device="cpu")
    model.save_pretrained(tmp_path / "again")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    for again in (mxrot.load(tmp_path / "again", dtype=torch.float32, device="cpu"), by_transformers):
        assert torch.equal(logits(again), logits(model))


def test_a_model_that_was_quantized_in_memory_can_be_saved(source: Path, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = logits(original)
    model = mxrot.quantize(original, load_recipe("hadamard").changed({"ignore": ["q_proj"]}))
    assert isinstance(model, PreTrainedModel) and torch.equal(logits(original), before)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(mxrot.load(tmp_path / "out", device="cpu")), logits(model))
    assert not torch.equal(logits(model), before)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="header"):
        mxrot.load(tmp_path / "out", device="cpu")


def test_a_loaded_model_is_quantized_into_a_folder(source: Path, tmp_path: Path) -> None:
    original, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    options: dict[str, Any] = {"samples": 2, "seq_len": 64}
    with pytest.raises(TypeError, match="needs the tokenizer"):
        mxrot.quantize(original, "duquant++", tmp_path / "one", **options)
    mxrot.quantize(original, "duquant++", tmp_path / "one", tokenizer=tokenizer, **options)
    mxrot.quantize(source, "duquant++", tmp_path / "two", **options)
    assert torch.equal(
        logits(mxrot.load(tmp_path / "one", device="cpu")), logits(mxrot.load(tmp_path / "two", device="cpu"))
    )


def test_what_no_checkpoint_can_hold_has_no_config(source: Path) -> None:
    model = mxrot.quantize(source, load_recipe("rtn").changed({"weights.rule": "log256"}))
    assert isinstance(model, PreTrainedModel) and getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["rtn", "hadamard"])
def test_a_model_is_quantized_when_it_is_loaded(tmp_path: Path, name: str, tied: bool) -> None:
    source = write_tiny_model(tmp_path / "source", tie_word_embeddings=tied, attention_bias=True)
    config = mxrot.MxrotConfig(name)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    expected = mxrot.quantize(source, name)
    assert isinstance(expected, PreTrainedModel) and torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_a_recipe_that_needs_text_is_refused_on_load() -> None:
    with pytest.raises(ConfigError, match=r"recipe mxrot needs calibration text: use mxrot\.quantize"):
        mxrot.MxrotConfig("mxrot")
    with pytest.raises(ConfigError, match="log256"):
        mxrot.MxrotConfig(load_recipe("rtn").changed({"weights.rule": "log256"}))


def test_it_generates(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        model.generate(TOKENS, **options),
        mxrot.load(folder, dtype=model.dtype, device="cpu").generate(TOKENS, **options),
    )


@pytest.mark.parametrize(
    "imports", ["import mxrot, transformers", "import transformers.modeling_utils, mxrot", "import transformers, mxrot"]
)
def test_the_order_of_imports_does_not_matter(source: Path, tmp_path: Path, imports: str) -> None:
    folder = tmp_path / "out"
    write(source, folder, recipe("hadamard"))
    program = f"""{imports}
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
print({{type(module).__name__ for module in model.modules()}})"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "QuantLinear" in done.stdout, done.stderr


def test_importing_mxrot_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, mxrot; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_other_checkpoints_of_that_method_are_left_to_their_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Others:
        quant_method = autoload.METHOD

        @staticmethod
        def from_dict(table: dict[str, Any]) -> str:
            return f"config of {table['format']}"

        def to_dict(self) -> dict[str, Any]:
            return {"format": "pack-quantized"}

    configs = {autoload.METHOD: Others}
    quantizers = {autoload.METHOD: lambda config, **options: f"quantizer of {config.to_dict()['format']}, {options}"}
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", configs)
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", quantizers)
    autoload.install()
    assert configs[autoload.METHOD].from_dict({"format": "pack-quantized"}) == "config of pack-quantized"
    assert (
        quantizers[autoload.METHOD](Others(), pre_quantized=True)
        == "quantizer of pack-quantized, {'pre_quantized': True}"
    )
    replaced = quantizers[autoload.METHOD]
    autoload.install()
    assert quantizers[autoload.METHOD] is replaced


def test_another_version_is_refused() -> None:
    with pytest.raises(CheckpointError, match="checkpoint format version 7; this mxrot reads versions 1 to 5"):
        CheckpointConfig.from_dict({"quant_method": "compressed-tensors", "mxrot": {"format_version": 7}})
