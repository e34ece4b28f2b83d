"""Quantized products of attention: from a recipe to disk and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import TOKENS, WINDOWS, all_tensors, logits, recipe, write
from transformers import AutoModelForCausalLM

import mxrot
from mxrot.checkpoint import load
from mxrot.checkpoint.config import compressed_tensors_config
from mxrot.errors import CheckpointError, ConfigError
from mxrot.evaluation import attention_operands
from mxrot.layers import build_apart, operands_of
from mxrot.models import FAMILIES, find_family
from mxrot.planning import Machine, make_plan, rates
from mxrot.quantizing.problems import find_problems
from mxrot.recipe import Recipe, load_recipe
from mxrot.report import plan_report
from mxrot.scheme import Scheme
from mxrot.vllm.verdict import plan_for_vllm

ATTENTION = {"attention__queries_keys": "amxfp4", "attention__probabilities_values": "mxfp4"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source"), dtype=torch.float32, head_dim=32)


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    write(source, folder, load_recipe("amxfp4-attention"))
    return folder


def changed_config(folder: Path, copy: Path, change: Any) -> Path:
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    table = json.loads((copy / "config.json").read_text())
    change(table["quantization_config"])
    (copy / "config.json").write_text(json.dumps(table))
    return copy


def test_a_checkpoint_gives_the_logits_of_the_model(source: Path, written: Path) -> None:
    expected = logits(mxrot.quantize(source, "amxfp4-attention", device="cpu"))
    loaded = load(written)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)), expected)
    other = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32, attn_implementation="eager")
    assert torch.allclose(logits(other), expected, atol=1e-4)
    assert attention_operands(loaded) == {
        "queries and keys amxfp4 absmax, probabilities and values amxfp4 absmax": len(loaded.model.layers)
    }
    assert not torch.allclose(logits(mxrot.quantize(source, "amxfp4", device="cpu")), expected, atol=1e-3)
    for block in loaded.model.layers:
        found = operands_of(block.self_attn)
        assert found is not None and found.spelled == (
            "queries and keys amxfp4 absmax, probabilities and values amxfp4 absmax"
        )


def test_what_transformers_quantizes_while_it_loads_has_it_too(source: Path, tmp_path: Path) -> None:
    chosen = mxrot.MxrotConfig("amxfp4-attention")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=chosen)
    expected = logits(model)
    assert torch.equal(logits(mxrot.quantize(source, "amxfp4-attention", device="cpu")), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), expected)


def test_config_and_card_say_it(written: Path) -> None:
    table = json.loads((written / "config.json").read_text())["quantization_config"]
    absmax = {"format": "amxfp4", "rule": "absmax"}
    assert table["mxrot"]["attention"] == {"queries_keys": absmax, "probabilities_values": absmax}
    assert table["mxrot"]["format_version"] == 3 and table["format"] == "mxrot"
    card = (written / "README.md").read_text()
    assert "amxfp4 weights and amxfp4 activations with quantized attention" in card
    assert "operands of attention's products are quantized at run time: queries and keys amxfp4 absmax" in card


def test_others_refuse_it_whatever_the_linears_have(source: Path) -> None:
    """MXFP4 without a transform is plain compressed-tensors, but for the attention."""
    model = build_apart(mxrot.models.read_config(source))
    family = find_family(model.config, "tiny")
    chosen = load_recipe("rtn").changed({"attention.queries_keys": "mxfp4"})
    scheme = Scheme.of(chosen, family, model)
    with pytest.raises(ConfigError, match=r"^compressed-tensors: the operands of attention's products are quantized$"):
        compressed_tensors_config(scheme, family, torch.float16)
    report = plan_for_vllm(model, family, chosen)
    for serving in (report.stock, report.plugin):
        assert serving.stops == (
            "it quantizes the operands of attention's products, which neither vLLM nor the plugin does",
        )


DAMAGE = {
    "no word of it": (lambda q: q["mxrot"].pop("attention"), "format_version: expected 2, got 3"),
    "an older version": (lambda q: q["mxrot"].update(format_version=2), "format_version: expected 3, got 2"),
    "another format": (
        lambda q: q["mxrot"]["attention"]["queries_keys"].update(format="mxfp4", rule="even"),
        "contradict each other: attention: queries and keys amxfp4 absmax, .* in recipe.toml, queries and keys mxfp4",
    ),
    "a rule of weights": (
        lambda q: q["mxrot"]["attention"]["queries_keys"].update(format="mxfp4", rule="mse"),
        "attention.queries_keys: rule 'mse' does not apply to inputs",
    ),
    "half a table": (
        lambda q: q["mxrot"]["attention"].pop("queries_keys"),
        "attention: expected queries_keys and prob",
    ),
    "nothing": (
        lambda q: q["mxrot"].update(attention={"queries_keys": None, "probabilities_values": None}),
        "attention: queries_keys and probabilities_values are both empty",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_config_that_was_changed_is_refused(name: str, written: Path, tmp_path: Path) -> None:
    change, said = DAMAGE[name]
    with pytest.raises(CheckpointError, match=said):
        load(changed_config(written, tmp_path / "changed", change), verify=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention.queries_keys": ""}, "attention: queries_keys and probabilities_values are both empty; leave"),
        ({"attention.queries_keys": "mxfp3"}, "attention: unknown format 'mxfp3'"),
        ({"attention.probabilities_values": "nvfp4"}, "probabilities_values: nvfp4 absmax has scales that depend on"),
        (
            {"attention.probabilities_values": "int4_row"},
            "probabilities_values: int4_row absmax has scales that depend",
        ),
        ({"attention.values": "mxfp4"}, "attention: unknown key 'values'"),
        ({"attention.queries_keys": "mxfp4", "tuning.steps": 3}, "tuning and trained rotations were not tried through"),
        (
            {"attention.queries_keys": "mxfp4", "rotation.residual": "hadamard", "rotation.steps": 3},
            "tuning and trained rotations were not tried through",
        ),
    ],
)
def test_a_recipe_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe("rtn").changed(changes)


def test_a_recipe_is_written_and_taken_back() -> None:
    chosen = load_recipe("amxfp4-attention")
    assert Recipe.from_toml(chosen.to_toml(), "again") == chosen
    assert chosen.changed({"attention": "none", "name": "amxfp4"}).attention is None
    assert chosen.formats.endswith(
        "; attention's queries and keys amxfp4 absmax, probabilities and values amxfp4 absmax"
    )
    assert load_recipe("rtn").changed({"attention.queries_keys": "int4_row"}).attention is not None


def problems(family: str, **changes: Any) -> list[str]:
    config = config_of(FAMILIES[family], **({"head_dim": 32} | changes))
    chosen = load_recipe("amxfp4-attention")
    return [str(one) for one in find_problems(build_apart(config), FAMILIES[family], chosen, family)]


def test_what_attention_does_besides_is_refused_by_name() -> None:
    gemma2, gemma3, mistral = (problems(family) for family in ("gemma2", "gemma3", "mistral"))
    assert gemma2 == [
        "recipe amxfp4-attention: attention: products with quantized operands know no soft caps "
        "(attn_logit_softcapping) and no windows (sliding_window 4), which this model of family gemma2 has; leave out "
        "the table [attention]"
    ]
    assert "know no windows (sliding_window 4), which this model of family gemma3 has" in gemma3[0]
    assert "know no windows (sliding_window 4096), which this model of family mistral has" in mistral[0]
    assert problems("mistral", sliding_window=None) == problems("llama") == []
    assert (
        "heads are 16 wide, which is not a multiple of the block size 32 of amxfp4" in problems("llama", head_dim=16)[0]
    )


def test_it_is_refused_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = write_tiny_model(tmp_path)
    monkeypatch.setattr("mxrot.models.FolderSource.block", None)
    monkeypatch.setattr("mxrot.models.FolderSource.outer", None)
    with pytest.raises(ConfigError, match="heads are 16 wide"):
        mxrot.quantize(narrow, "amxfp4-attention", device="cpu")


def codes(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in all_tensors(folder).items() if name.endswith("weight_packed")}


def test_what_follows_attention_is_calibrated_on_what_that_gives(source: Path, tmp_path: Path) -> None:
    chosen = recipe("duquant++-gptq")
    write(source, tmp_path / "plain", chosen, windows=WINDOWS)
    write(source, tmp_path / "quantized", recipe("duquant++-gptq", **ATTENTION), windows=WINDOWS)
    plain, quantized = codes(tmp_path / "plain"), codes(tmp_path / "quantized")
    assert plain.keys() == quantized.keys()
    same = {name.removeprefix("model.layers.") for name in plain if torch.equal(plain[name], quantized[name])}
    assert same == {f"0.self_attn.{name}_proj.weight_packed" for name in "qkv"}
    assert logits(load(tmp_path / "quantized")).shape[:2] == TOKENS.shape


def test_the_original_beside_it_is_left_alone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe mxrot looks at both."""
    seen: list[bool] = []
    copied = mxrot.quantizing.block.copy_of

    def copy_of(run: Any, block: torch.nn.Module) -> torch.nn.Module:
        found = copied(run, block)
        seen.append(operands_of(block.self_attn) is not None and operands_of(found.self_attn) is None)
        return found

    monkeypatch.setattr("mxrot.quantizing.block.copy_of", copy_of)
    chosen = load_recipe("mxrot").changed({"calibration.generated": 0.0, "attention.queries_keys": "mxfp4"})
    model = mxrot.quantizing.quantize(source, chosen, windows=WINDOWS).model
    assert seen == [True, True] and model is not None
    assert all(operands_of(block.self_attn) is not None for block in model.model.layers)


def test_a_plan_says_it_and_counts_the_scores(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SECONDS", 0.0)
    machine = Machine(torch.device("cpu"))
    attention, plain = (
        make_plan("tiny", source, recipe("duquant++-gptq", **changes), machine, 8, 2048) for changes in (ATTENTION, {})
    )
    said = "operands of attention: queries and keys amxfp4 absmax, probabilities and values mxfp4 even"
    assert said in plan_report(attention) and said not in plan_report(plain)
    assert attention.sizes is not None and plain.sizes is not None
    assert attention.sizes.shape.score_heads == 4 and plain.sizes.shape.score_heads == 0
