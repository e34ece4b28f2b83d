"""One source of truth: a checkpoint that contradicts itself is refused, whoever opens it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases.commands import IDS, logits, refused
from tests.cases.commands import mxrot as command
from tests.tiny_model import tiny_config, write_tiny_model, write_tokenizer
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM, Phi3Config, Phi3ForCausalLM

import mxrot
from mxrot.errors import CheckpointError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny", bos_token_id=0)


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "out"
    mxrot.quantize(str(source), "hadamard", str(folder), device="cpu")
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


def unsigned(folder: Path) -> Path:
    """run.json made to fit what a person has edited."""
    run = json.loads((folder / "run.json").read_text())
    from hashlib import sha256

    for name, entry in run["files"].items():
        data = (folder / name).read_bytes()
        entry.update(bytes=len(data), sha256=sha256(data).hexdigest())
    (folder / "run.json").write_text(json.dumps(run))
    return folder


RECIPE_EDITS = {
    "rule": (
        '(\\[activations\\]\nformat = "mxfp4"\nrule = )".*?"',
        r'\1"floor"',
        "activations mxfp4 floor in recipe",
    ),
    "sharing": (  # of a method that has not one matrix for all blocks anyway
        'method = "hadamard"\nsharing = "site"',
        'method = "random-orthogonal"\nsharing = "block"',
        "transform block-diagonal 32 block in recipe",
    ),
    "block": ("block = 32", "block = 16", "transform block-diagonal 16 site in recipe"),
    "accumulation": ('accumulation = "exact"', 'accumulation = "fast"', "accumulation fast in recipe"),
    "ignore": (r"ignore = \[\]", 'ignore = ["q_proj"]', "q_proj is unquantized in recipe.toml only"),
    "transform": ('method = "hadamard"', 'method = "identity"', "transform none in recipe"),
    "no activations": (r"\[activations\]\n[^\[]*", "", "activations None in recipe"),
}


@pytest.mark.case("B5")
@pytest.mark.parametrize(("old", "new", "message"), RECIPE_EDITS.values(), ids=RECIPE_EDITS)
def test_an_edited_recipe_is_refused_by_everyone(folder: Path, old: str, new: str, message: str) -> None:
    text = (folder / "recipe.toml").read_text()
    edited = re.sub(old, new, text)
    assert edited != text
    (folder / "recipe.toml").write_text(edited)
    unsigned(folder)
    with pytest.raises(CheckpointError, match=message):
        mxrot.load(folder)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    assert re.search(message, refused("export", folder))
    assert re.search(message, refused("generate", folder, "x"))


@pytest.mark.case("B5")
def test_what_runs_does_not_depend_on_what_a_recipe_says_of_how_it_came_about(folder: Path) -> None:
    before = logits(mxrot.load(folder, "cpu"))
    path = folder / "recipe.toml"
    path.write_text(path.read_text().replace('name = "hadamard"', 'name = "mine"'))
    assert torch.equal(logits(mxrot.load(unsigned(folder), "cpu")), before)


@pytest.mark.case("B8")
def test_a_path_that_holds_the_word_version(written: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(written, tmp_path / "version 2" / "marker"))
    again = tmp_path / "version" / "again"
    model = mxrot.load(place, "cpu")
    model.save_pretrained(again, max_shard_size="30KB")
    assert len(list(again.glob("*.safetensors"))) > 1
    assert torch.equal(logits(mxrot.load(again, "cpu")), logits(model))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def scheme_of(quantization: dict[str, Any]) -> dict[str, Any]:
    """What the marker says of the only group."""
    found: dict[str, Any] = quantization["mxrot"]["schemes"]["group_0"]
    return found


def inputs(quantization: dict[str, Any], rule: str | None) -> None:
    """Give the inputs another rule, or none, in both places that say it."""
    for table in (
        scheme_of(quantization)["activations"],
        quantization["config_groups"]["group_0"]["input_activations"],
    ):
        table.pop("rule") if rule is None else table.update(rule=rule)


def weights(quantization: dict[str, Any], **change: Any) -> None:
    """The same of the weights."""
    for table in (scheme_of(quantization)["weights"], quantization["config_groups"]["group_0"]["weights"]):
        table.update(change)


CONFIG_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no format": lambda q: q.pop("format"),
    "another format": lambda q: q.update(format="mxfp6_e2m3"),
    "a format that is null": lambda q: q.update(format=None),
    "a format that is a number": lambda q: q.update(format=4),
    "no marker": lambda q: q.pop("mxrot"),
    "a marker that is a text": lambda q: q.update(mxrot="yes"),
    "a version that is a text": lambda q: q["mxrot"].update(format_version="1"),
    "a version that is true": lambda q: q["mxrot"].update(format_version=True),
    "no rule": lambda q: inputs(q, None),
    "a rule for weights": lambda q: inputs(q, "mse"),
    "a rule that is no power of two": lambda q: inputs(q, "log256"),
    "a rule where inputs are left": lambda q: q["config_groups"]["group_0"].update(input_activations=None),
    "no rule where inputs are quantized": lambda q: scheme_of(q).update(activations=None),
    "no sharing": lambda q: scheme_of(q)["transform"][0].pop("sharing"),
    "another accumulation": lambda q: scheme_of(q).update(accumulation="quick"),
    "an ignore that is a text": lambda q: q.update(ignore="lm_head"),
    "an ignore of numbers": lambda q: q.update(ignore=[1]),
    "an ignore of a linear that is not there": lambda q: q["ignore"].append("model.layers.9.mlp.up_proj"),
    "an ignore of one that is quantized": lambda q: q["ignore"].append("model.layers.0.mlp.up_proj"),
    "no ignore": lambda q: q.pop("ignore"),
    "words of another program": lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=32),
    "eight bits": lambda q: weights(q, format="mxfp8_e4m3"),
    "a group that others read": lambda q: q["config_groups"]["group_0"].update(format="mxfp4-pack-quantized"),
    "two groups": lambda q: q["config_groups"].update(group_1={}),
    "no groups": lambda q: q.pop("config_groups"),
    "no transforms": lambda q: scheme_of(q).update(transform=[]),
    "transforms that are null": lambda q: scheme_of(q).update(transform=None),
    "transforms for others": lambda q: q.update(transform_config={"config_groups": {}}),
    "a transform of other linears": lambda q: q["config_groups"]["group_0"].update(targets=["re:.*"]),
}
EXPORT_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no transforms": lambda q: q.pop("transform_config"),
    "transforms that are null": lambda q: q.update(transform_config=None),
    "one transform gone": lambda q: q["transform_config"]["config_groups"].pop("layer1_down"),
    "a transform of other linears": lambda q: q["transform_config"]["config_groups"]["layer0_qkv"]["apply"][0].update(
        targets=["re:.*"]
    ),
    "another group size": lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=16),
    "eight bits": lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=8),
    "a group that others read": lambda q: q["config_groups"]["group_0"].update(format="mxfp4-pack-quantized"),
}


@pytest.mark.case("B9", "G1")
@pytest.mark.parametrize("change", CONFIG_EDITS.values(), ids=CONFIG_EDITS)
def test_a_quantization_config_that_is_not_whole(
    folder: Path, change: Callable[[dict[str, Any]], object], request: pytest.FixtureRequest
) -> None:
    unsigned(edit(folder, change))
    with pytest.raises(CheckpointError) as raised:
        mxrot.load(folder)
    assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.case("B9", "G1")
@pytest.mark.parametrize("change", EXPORT_EDITS.values(), ids=EXPORT_EDITS)
def test_an_exported_quantization_config_that_is_not_whole(
    written: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = tmp_path / "exported"
    assert command("export", written, "-o", folder).exit_code == 0
    mxrot.load(folder)
    unsigned(edit(folder, change))
    with pytest.raises(CheckpointError):
        mxrot.load(folder)
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.case("B9")
def test_an_unknown_format_through_every_command(folder: Path) -> None:
    unsigned(edit(folder, lambda q: q.pop("format")))
    for words in (("eval", folder), ("generate", folder, "x"), ("export", folder), ("inspect", folder)):
        assert "format None is not known" in refused(*words)


@pytest.mark.case("B10")
@pytest.mark.parametrize(
    "inputs",
    [
        {"activations.format": "nvfp4", "activations.rule": ""},
        {"activations.rule": "log256"},
        {"activations.format": "int4_g32", "activations.rule": ""},
    ],
    ids=str,
)
def test_a_token_does_not_depend_on_the_others_of_its_batch(source: Path, inputs: dict[str, str]) -> None:
    from mxrot.recipe import load_recipe

    model = mxrot.quantize(str(source), load_recipe("rtn").changed(inputs), device="cpu")
    model.model.embed_tokens.weight.data[255] *= 100
    quiet, loud, later = (IDS.clamp(max=254) for _ in range(3))
    loud[1] = 255
    later[0, 8:] = 255
    expected = logits(model, quiet)[0]
    assert torch.equal(logits(model, loud)[0], expected)
    assert torch.equal(logits(model, later)[0, :8], expected[:8])


FAMILIES = {"Phi-3": (Phi3Config, Phi3ForCausalLM), "OLMo 2": (Olmo2Config, Olmo2ForCausalLM)}


@pytest.mark.case("B12")
@pytest.mark.parametrize("recipe", ["rtn", "hadamard"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plan_and_export_agree(tmp_path: Path, family: str, recipe: str) -> None:
    configs, models = FAMILIES[family]
    shared = tiny_config(pad_token_id=0, bos_token_id=0).to_diff_dict()
    settings = {key: value for key, value in shared.items() if key not in ("model_type", "architectures", "head_dim")}
    models(configs(**settings)).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    planned, exported = tmp_path / "plan.json", tmp_path / "export.json"
    assert command("plan", tmp_path / "model", "-r", recipe, "--json", planned).exit_code == 0
    mxrot.quantize(str(tmp_path / "model"), recipe, str(tmp_path / "out"), device="cpu")
    assert command("export", tmp_path / "out", "--json", exported).exit_code == 0
    assert json.loads(planned.read_text())["vllm"].items() <= json.loads(exported.read_text()).items()


@pytest.mark.case("B12")
@pytest.mark.parametrize("change", ["transform.sharing=block", 'ignore=["q_proj"]', 'ignore=["k_proj", "v_proj"]'])
def test_plan_and_export_agree_on_changed_recipes(source: Path, tmp_path: Path, change: str) -> None:
    from mxrot.recipe import load_recipe

    planned, exported = tmp_path / "plan.json", tmp_path / "export.json"
    assert command("plan", source, "-r", "hadamard", "--set", change, "--json", planned).exit_code == 0
    key, value = change.split("=")
    chosen = load_recipe("hadamard").changed({key: json.loads(value) if value[0] == "[" else value})
    mxrot.quantize(str(source), chosen, str(tmp_path / "out"), device="cpu")
    assert command("export", tmp_path / "out", "--json", exported).exit_code == 0
    assert json.loads(planned.read_text())["vllm"].items() <= json.loads(exported.read_text()).items()
