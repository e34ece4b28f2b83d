"""Checkpoints of every format, and of several at once: what is loaded is what was made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import all_tensors, digests, logits, recipe, windows_for, write
from torch import nn
from transformers import AutoModelForCausalLM

import mxrot
from mxrot import quantizing
from mxrot.checkpoint import load
from mxrot.checkpoint.checked import check_checkpoint
from mxrot.checkpoint.config import compressed_tensors_config, why_unfaithful
from mxrot.checkpoint.reader import own_dtype
from mxrot.errors import CheckpointError, ConfigError
from mxrot.formats import FORMATS
from mxrot.layers import QuantLinear
from mxrot.recipe import Recipe

DOWN_IN_MXFP8 = {"sites": ["down_proj"], "format": "mxfp8_e4m3"}
LAST_AS_IT_IS = {"blocks": [-1, -1], "weights": "none"}


def mixture(name: str = "hadamard", *tables: dict[str, Any]) -> Recipe:
    return recipe(name, override=list(tables or (DOWN_IN_MXFP8, LAST_AS_IT_IS)))


def in_memory(source: Path, chosen: Recipe) -> torch.Tensor:
    model = quantizing.quantize(source, chosen, windows=windows_for(chosen)).model
    assert model is not None
    return logits(model)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose inputs are multiples of 128."""
    folder = tmp_path_factory.mktemp("wide") / "source"
    return write_tiny_model(folder, hidden_size=128, intermediate_size=128, head_dim=32)


def named(format: str) -> list[tuple[str, str]]:
    return [("format", format), ("rule", FORMATS[format].default_rule)]


WEIGHTS_ALONE = {"lut2", "lut2_g128"}
"""Formats without a rule for inputs."""


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_checkpoint_holds_every_format(wide: Path, tmp_path: Path, format: str) -> None:
    assert (format in WEIGHTS_ALONE) == (not any(FORMATS[format].rule(rule).dynamic for rule in FORMATS[format].rules))
    inputs = "mxfp8_e4m3" if format in WEIGHTS_ALONE else format
    sections = {"weights": format, "activations": inputs}
    default = {f"{section}__{key}": value for section, own in sections.items() for key, value in named(own)}
    chosen = recipe("hadamard", **default)
    run = write(wide, tmp_path / "out", chosen)
    expected = in_memory(wide, chosen)
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(theirs), expected)
    tensors = all_tensors(tmp_path / "out")
    taken = sum(8 * value.nbytes for name, value in tensors.items() if ".weight_" in name)
    assert run["size"]["bits_per_weight"] == taken / run["size"]["quantized_weights"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"] == "mxrot"


@pytest.mark.parametrize("name", ["rtn", "hadamard", "duquant++-gptq", "smoothquant"])
def test_a_mixture_is_loaded_as_it_was_made(source: Path, tmp_path: Path, name: str) -> None:
    chosen = mixture(name)
    run = write(source, tmp_path / "out", chosen)
    expected = in_memory(source, chosen)
    model = load(tmp_path / "out")
    assert torch.equal(logits(model), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(theirs), expected)
    formats = {
        name: module.weights.format.name for name, module in model.named_modules() if isinstance(module, QuantLinear)
    }
    assert formats.pop("model.layers.0.mlp.down_proj") == "mxfp8_e4m3"
    assert set(formats.values()) == {"mxfp4"} and all(".layers.0." in name for name in formats)
    assert isinstance(model.get_submodule("model.layers.1.mlp.up_proj"), nn.Linear)
    assert not torch.equal(expected, in_memory(source, recipe(name)))
    weights = {"mxfp4": 3 * 64 * 64 + 2 * 64 * 96, "mxfp8": 64 * 96}
    whole = 2 * sum(weights.values())
    bits = 4.25 * weights["mxfp4"] + 8.25 * weights["mxfp8"] + 16 * whole / 2
    assert run["size"]["bits_per_weight"] == pytest.approx(bits / whole)


def test_one_config_group_for_each_scheme(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", mixture())
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(table["config_groups"]) == ["group_0", "group_1"] == list(table["mxrot"]["schemes"])
    assert table["config_groups"]["group_1"]["targets"] == [r"re:(?:.*\.)?model\.layers\.0\.(?:mlp\.down_proj)$"]
    assert table["mxrot"]["schemes"]["group_1"]["weights"] == {"format": "mxfp8_e4m3", "rule": "even"}
    last = [f"model.layers.1.{name}" for name in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")]
    assert table["ignore"][:4] == ["lm_head", *last] and len(table["ignore"]) == 8
    layout = check_checkpoint(tmp_path / "out").layout
    down = layout.scheme_of("model.layers.0.mlp.down_proj")
    assert down is not None and down.weights.format.name == "mxfp8_e4m3"
    assert layout.scheme_of("model.layers.1.mlp.down_proj") is layout.scheme_of("lm_head") is None


def test_blocks_that_are_left_are_what_compressed_tensors_has_words_for(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", mixture("rtn", LAST_AS_IT_IS))
    checked = check_checkpoint(tmp_path / "out")
    assert why_unfaithful(checked.scheme) is None
    assert compressed_tensors_config(checked.scheme, checked.family, torch.float16) == checked.quantization
    write(source, tmp_path / "mixed", mixture("rtn", DOWN_IN_MXFP8))
    scheme = check_checkpoint(tmp_path / "mixed").scheme
    assert why_unfaithful(scheme) == "it has no layout for weights in mxfp8_e4m3 with inputs in mxfp8_e4m3"


def test_experts_of_several_formats(tmp_path: Path) -> None:
    """One expert of the second block otherwise than all others, and gate and up of the first block."""
    source = write_tiny_mixture(tmp_path / "tiny", "qwen3_moe")
    one = {"sites": ["down_2"], "blocks": [1, 1], "format": "mxfp8_e4m3"}
    chosen = mixture("duquant++-gptq", one, {"sites": ["gate_up"], "blocks": [0, 0], "activations": "none"})
    run = write(source, tmp_path / "out", chosen)
    assert run["size"]["bits_per_weight"] > 4.25
    expected = in_memory(source, chosen)
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(theirs), expected)
    layout = check_checkpoint(tmp_path / "out").layout
    found = {number: layout.scheme_of(f"model.layers.1.mlp.experts.{number}.down_proj") for number in range(4)}
    assert [one.weights.format.name for one in found.values() if one] == ["mxfp4", "mxfp4", "mxfp8_e4m3", "mxfp4"]


def test_a_mixture_goes_on_where_it_was_stopped(source: Path, tmp_path: Path) -> None:
    chosen = mixture("duquant++-gptq", DOWN_IN_MXFP8)
    write(source, tmp_path / "whole", chosen)

    class StoppedError(Exception):
        pass

    def stop(done: float, total: int, what: str) -> None:
        if done >= 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        write(source, tmp_path / "out", chosen, progress=stop)
    write(source, tmp_path / "out", chosen, resume=True)
    found, expected = digests(tmp_path / "out"), digests(tmp_path / "whole")
    assert {name: found[name] for name in found if name != "run.json"} == {
        name: expected[name] for name in expected if name != "run.json"
    }


def test_in_memory_saved_and_loaded_again(source: Path, tmp_path: Path) -> None:
    model = mxrot.quantize(source, mixture(), device="cpu")
    expected = logits(model)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "saved")  # type: ignore[union-attr]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), expected)


Edit = Callable[[dict[str, Any]], object]


def edited(folder: Path, change: Edit) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "out"
    write(source, folder, mixture())
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


RULE = r"recipe.toml and config.json contradict each other: model.layers.0.mlp.down_proj: activations mxfp8_e4m3 {} in "


@pytest.mark.parametrize("opened", [load, AutoModelForCausalLM.from_pretrained])
def test_a_rule_edited_in_either_file_is_refused(copied: Path, opened: Callable[[Path], object]) -> None:
    toml = (copied / "recipe.toml").read_text()
    run = json.loads((copied / "run.json").read_text())
    for name in ("config.json", "recipe.toml"):
        del run["files"][name]  # as if nobody had kept their hashes
    (copied / "run.json").write_text(json.dumps(run))
    table = '[[override]]\nsites = ["down_proj"]\nactivations.rule = "floor"\n'
    (copied / "recipe.toml").write_text(f"{toml}\n{table}")
    with pytest.raises(CheckpointError, match=RULE.format("floor")):
        opened(copied)
    (copied / "recipe.toml").write_text(toml)
    opened(copied)
    edited(copied, lambda q: q["mxrot"]["schemes"]["group_1"]["activations"].update(rule="floor"))
    with pytest.raises(CheckpointError, match=r"group_1.input_activations.rule: expected 'floor', got 'even'"):
        opened(copied)
    edited(copied, lambda q: q["config_groups"]["group_1"]["input_activations"].update(rule="floor"))
    with pytest.raises(CheckpointError, match=RULE.format("even") + r"recipe.toml, mxfp8_e4m3 floor in config.json"):
        opened(copied)


EDITS: dict[str, tuple[Edit, str]] = {
    "a group without a scheme": (lambda q: q["mxrot"]["schemes"].pop("group_1"), "not tables of the same groups"),
    "groups that are no table": (lambda q: q.update(config_groups=[]), "not tables of the same groups"),
    "no targets": (lambda q: q["config_groups"]["group_1"].update(targets=[]), "group_1.targets: expected names"),
    "a broken target": (
        lambda q: q["config_groups"]["group_1"].update(targets=["re:("]),
        "group_1.targets: missing",
    ),
    "other targets": (
        lambda q: q["config_groups"]["group_1"].update(targets=["model.layers.0.mlp.down_proj"]),
        "group_1.targets: expected",
    ),
    "all linears twice": (
        lambda q: q["config_groups"]["group_1"].update(targets=["Linear"]),
        "2 config groups and `ignore` say what model.layers.0.self_attn.q_proj is",
    ),
    "a linear that nobody names": (
        lambda q: q["config_groups"]["group_1"].update(targets=["nothing"]),
        "no config group and `ignore` say what model.layers.0.mlp.down_proj is",
    ),
    "an unknown format": (
        lambda q: q["mxrot"]["schemes"]["group_1"]["weights"].update(format="mxfp5"),
        "group_1.weights: unknown format 'mxfp5'",
    ),
    "a rule for weights": (
        lambda q: q["mxrot"]["schemes"]["group_1"]["activations"].update(rule="mse"),
        "rule 'mse' does not apply to inputs",
    ),
    "an unknown stage": (
        lambda q: q["mxrot"]["schemes"]["group_1"].update(transform=[{"kind": "wavelet"}]),
        "group_1.transform: stage kind 'wavelet' is not known",
    ),
    "no transform": (
        lambda q: q["mxrot"]["schemes"]["group_1"].update(transform=[]),
        "down_proj: transform block-diagonal 32 site in recipe.toml, none in config.json",
    ),
    "more words": (
        lambda q: q["mxrot"]["schemes"]["group_1"].update(bits=3),
        r"schemes.group_1: expected \{.*, got .*'bits': 3",
    ),
    "no type": (lambda q: q["mxrot"].pop("dtype"), "mxrot.dtype: expected a type such as bfloat16, got None"),
    "a type that is none": (lambda q: q["mxrot"].update(dtype="int8"), "mxrot.dtype: expected a type"),
    "their format": (lambda q: q.update(format="mxfp4-pack-quantized"), "it has no layout for weights in mxfp8_e4m3"),
    "their transforms beside ours": (
        lambda q: q.update(transform_config={"config_groups": {}}),
        "'transform_config' is not expected",
    ),
    "a cache": (
        lambda q: q.update(
            kv_cache_scheme={key: {"format": "mxfp8_e4m3", "rule": "even"} for key in ("keys", "values")}
        ),
        "kv_cache_scheme: expected keys, values, first, last, key_transform, value_transform, got",
    ),
    "a cache of other programs": (
        lambda q: q.update(kv_cache_scheme={"num_bits": 8}),
        "kv_cache_scheme: expected keys",
    ),
}


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS)
def test_an_edited_config_is_refused(copied: Path, change: Edit, message: str) -> None:
    edited(copied, change)
    with pytest.raises(CheckpointError, match=message):
        load(copied, verify=False)


def test_what_is_not_quantized_is_held_in_the_type_of_most(tmp_path: Path) -> None:
    """An embedding in float32 does not make a model of bfloat16 one of float32."""
    source = write_tiny_model(tmp_path / "source", dtype=torch.bfloat16)
    (path,) = source.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    save_file(tensors, path, {"format": "pt"})
    write(source, tmp_path / "out", recipe("rtn"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["mxrot"]["dtype"] == "bfloat16"
    assert all_tensors(tmp_path / "out")["model.embed_tokens.weight"].dtype == torch.float32
    assert own_dtype(check_checkpoint(tmp_path / "out")) == torch.bfloat16


def test_what_cannot_be_combined_is_refused_before_anything(source: Path, tmp_path: Path) -> None:
    both = {"sites": ["down"], "format": "nvfp4"}, {"blocks": [0, 0], "weights": {"rule": "mse"}}
    with pytest.raises(ConfigError, match="recipe rtn, override 1, 2: weights: format nvfp4 has no scale rule 'mse'"):
        write(source, tmp_path / "out", mixture("rtn", *both))
    one = {"blocks": [0, 0], "weights": {"format": "int4_g128"}}
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj: in_features 64 is not a multiple of .* 128"):
        write(source, tmp_path / "out", mixture("rtn", one))
    assert not (tmp_path / "out").exists()
