"""A quantized head: from a recipe to disk and back, tied and not, what is left as it was, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import (
    TOKENS,
    all_tensors,
    change_shard,
    digests,
    logits,
    recipe,
    windows_for,
    without_run,
    write,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

import mxrot
from mxrot.checkpoint import load
from mxrot.checkpoint.config import compressed_tensors_config
from mxrot.errors import CheckpointError, ConfigError, FamilyError
from mxrot.evaluation import quantizers
from mxrot.formats import TensorQuantizer, fake_quantize
from mxrot.layers import HeadLinear, build_apart
from mxrot.models import find_family, read_config
from mxrot.planning import Machine, make_plan, rates
from mxrot.quantizing import quantize
from mxrot.recipe import Recipe
from mxrot.report.trials import model_size
from mxrot.scheme import Scheme
from mxrot.vllm.verdict import plan_for_vllm

HEADS: dict[str, dict[str, Any]] = {
    "mxint8": {"head__format": "mxint8"},
    "mxfp8": {"head__format": "mxfp8_e4m3", "head__rule": "mse"},
    "mxfp4": {"head__format": "mxfp4", "head__transform": "hadamard"},
    "mxfp4, inputs too": {"head__format": "mxfp4", "head__inputs": "mxfp4", "head__transform": "hadamard"},
}
RATES = rates.Rates(*[1e9] * len(fields(rates.Rates)))
EIGHT, ROTATED = recipe("rtn", **HEADS["mxint8"]), recipe("hadamard", **HEADS["mxfp4, inputs too"])


@pytest.fixture(scope="module", params=["own", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / request.param
    return write_tiny_model(folder, dtype=torch.bfloat16, tie_word_embeddings=request.param == "tied")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def written(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    write(tied, folder, ROTATED)
    return folder


def own_head(folder: Path) -> Tensor:
    tensors = all_tensors(folder)
    return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", ["rtn", "duquant++-gptq", "quarot"])
def test_what_is_loaded_is_what_was_quantized(source: Path, tmp_path: Path, name: str, kind: str) -> None:
    quick = {"transform__steps": 4} if kind.startswith("duquant") else {}
    chosen = recipe(kind, **quick, **HEADS[name])
    in_memory = quantize(source, chosen, windows=windows_for(chosen)).model
    assert in_memory is not None and isinstance(in_memory.lm_head, HeadLinear)
    write(source, tmp_path / "out", chosen)
    expected = logits(in_memory)
    loaded = load(tmp_path / "out")
    assert torch.equal(logits(loaded), expected) and isinstance(loaded.lm_head, HeadLinear)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(theirs), expected) and isinstance(theirs.lm_head, HeadLinear)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)


def test_all_but_the_head_has_the_bytes_that_it_has_without(source: Path, tmp_path: Path) -> None:
    """Blocks, norms and embedding; the head's codes are those of its own weights, and of the embedding where that is
    what it was."""
    write(source, tmp_path / "with", EIGHT)
    write(source, tmp_path / "without", recipe("rtn"))
    found, plain = all_tensors(tmp_path / "with"), all_tensors(tmp_path / "without")
    assert found.keys() - plain.keys() == {"lm_head.weight_packed", "lm_head.weight_scale"}
    assert plain.keys() - found.keys() <= {"lm_head.weight"}
    assert all(torch.equal(found[name], plain[name]) for name in found.keys() & plain.keys())
    quantizer = TensorQuantizer.of("mxint8")
    expected = fake_quantize(own_head(source).double(), quantizer.format, quantizer.rule)
    head = load(tmp_path / "with").lm_head
    assert isinstance(head, HeadLinear) and torch.equal(head.dequantized_weight(), expected.float())


def test_a_recipe_without_the_table_says_and_writes_nothing_of_it(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", recipe("rtn"))
    for name in ("recipe.toml", "run.json", "README.md"):
        assert "head_bytes" not in (tmp_path / "out" / name).read_text()
    assert "[head]" not in (tmp_path / "out/recipe.toml").read_text()
    assert "head" not in json.loads((tmp_path / "out/run.json").read_text())
    table = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert table["ignore"] == ["lm_head"] and table["mxrot"]["format_version"] == 2 and "head" not in table["mxrot"]
    assert Recipe.load("rtn").changed({"head": "none"}) == Recipe.load("rtn")


def test_cached_generation_equals_uncached(written: Path) -> None:
    for model in (load(written), AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)):
        options: Any = {"max_new_tokens": 12, "do_sample": False}
        cached = model.generate(TOKENS, **options, use_cache=True)
        assert torch.equal(cached, model.generate(TOKENS, **options, use_cache=False))


def test_a_run_that_was_killed_writes_the_same_bytes(tied: Path, written: Path, tmp_path: Path) -> None:
    told = []

    def kill(done: float, total: float, what: str) -> None:
        told.append(what)
        if what.startswith("model.layers.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tied, tmp_path / "out", ROTATED, progress=kill)
    assert told
    write(tied, tmp_path / "out", ROTATED, resume=True)
    assert without_run(digests(tmp_path / "out")) == without_run(digests(written))


def test_what_transformers_quantizes_while_it_loads_has_it_too(source: Path, tmp_path: Path) -> None:
    chosen = mxrot.MxrotConfig(ROTATED)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=chosen)
    write(source, tmp_path / "out", ROTATED)
    assert torch.equal(logits(model), logits(load(tmp_path / "out")))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_records_say_it(written: Path) -> None:
    table = json.loads((written / "config.json").read_text())
    quantization = table["quantization_config"]
    assert table["tie_word_embeddings"] is False and quantization["format"] == "mxrot" and quantization["ignore"] == []
    assert quantization["config_groups"]["head"]["targets"] == ["lm_head"]
    mxfp4 = {"format": "mxfp4", "rule": "even"}
    stage = {"kind": "block-diagonal", "block": 32, "sharing": "site"}
    assert quantization["mxrot"]["format_version"] == 5
    assert quantization["mxrot"]["schemes"]["head"] == {
        "weights": mxfp4,
        "activations": mxfp4,
        "transform": [stage],
        "accumulation": "exact",
    }
    run = json.loads((written / "run.json").read_text())
    assert (
        run["head"]["shape"] == [256, 64] and 0.05 < run["head"]["weight_error"] < 0.2 and run["changes"] == ["untied"]
    )
    assert run["left_alone"]["linears"] == []
    card = (written / "README.md").read_text()
    assert "mxfp4 weights and mxfp4 activations, the head in mxfp4" in card
    assert "no copy of the embedding: weights mxfp4 even, inputs mxfp4 even, block-diagonal" in card
    assert quantizers(load(written)) == {"weights mxfp4 even, inputs mxfp4 even": 15}


@pytest.mark.parametrize("name", HEADS)
def test_sizes_are_those_of_the_files(source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxrot.planning.plan.measure_rates", lambda *_: RATES)
    chosen = recipe("hadamard", **HEADS[name])
    size = write(source, tmp_path / "out", chosen)["size"]
    tensors = all_tensors(tmp_path / "out")
    of_head = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith("lm_head."))
    assert size["head_bytes"] == of_head and size["total_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    plan = make_plan("tiny", source, chosen, Machine(torch.device("cpu"))).as_table()
    assert {key: plan["size"]["after"][key] for key in size} == pytest.approx(size)
    assert plan["disk"]["total"] == size["total_bytes"]
    in_memory = model_size(load(tmp_path / "out"), torch.bfloat16)
    assert in_memory.as_table() == {key: size[key] for key in in_memory.as_table()}
    assert size["bits_per_weight"] == 4.25


def test_others_refuse_it_and_are_told_why(source: Path, written: Path) -> None:
    """MXFP4 without a transform is plain compressed-tensors, but for the head."""
    from compressed_tensors.quantization import QuantizationConfig

    model = build_apart(read_config(source))
    family = find_family(model.config, "tiny")
    with pytest.raises(ConfigError, match=r"^compressed-tensors: the head is quantized$"):
        compressed_tensors_config(Scheme.of(EIGHT, family, model), family, torch.float16)
    report = plan_for_vllm(model, family, EIGHT)
    (stop,) = report.stock.stops
    assert stop.startswith("it has a quantized head") and "install mxrot where vLLM runs" in stop
    assert (report.plugin.stops, report.plugin.tensor_parallel) == ((), (1,))
    table = json.loads((written / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="mxrot"):
        QuantizationConfig.model_validate(table)


DAMAGE = {
    "no word of it": (
        lambda c: _quantization(c)["config_groups"].pop("head"),
        "ignore: expected the names of the head",
    ),
    "no word of its scheme": (lambda c: _marker(c)["schemes"].pop("head"), "are not tables of the same groups"),
    "an older version": (lambda c: _marker(c).update(format_version=4), "ignore: expected the names of the head"),
    "two targets": (
        lambda c: _quantization(c)["config_groups"]["head"].update(targets=["lm_head", "other"]),
        "config_groups.head.targets: expected the name of the head, got",
    ),
    "another target": (
        lambda c: _quantization(c)["config_groups"]["head"].update(targets=["other"]),
        "config_groups.head.targets: expected",
    ),
    "another format": (
        lambda c: _both(c, "weights", {"format": "mxint8", "rule": "even"}),
        "contradict each other: head: weights mxfp4 even, .* in recipe.toml, weights mxint8 even, .* in config.json",
    ),
    "a head that is the embedding": (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings is true"),
    "the head among those that are left": (
        lambda c: _quantization(c).update(ignore=["lm_head"]),
        "ignore: 'lm_head' is no linear of a decoder block",
    ),
}


def _quantization(config: Any) -> Any:
    return config["quantization_config"]


def _marker(config: Any) -> Any:
    return _quantization(config)["mxrot"]


def _both(config: Any, key: str, table: Any) -> None:
    words = {"weights": "weights", "activations": "input_activations"}
    _quantization(config)["config_groups"]["head"][words[key]] = table
    _marker(config)["schemes"]["head"][key] = table


def copied(folder: Path, copy: Path) -> Path:
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("name", DAMAGE)
def test_a_config_that_was_changed_is_refused(name: str, written: Path, tmp_path: Path) -> None:
    change, said = DAMAGE[name]
    folder = copied(written, tmp_path / "changed")
    table = json.loads((folder / "config.json").read_text())
    change(table)
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=said):
        load(folder, verify=False)


@pytest.mark.parametrize(
    ("key", "format", "rule"),
    [
        ("weights", "nvfp4", "absmax"),
        ("weights", "int4_row", "absmax"),
        ("weights", "mxfp4", "log256"),
        ("activations", "nvfp4", "absmax"),
    ],
)
def test_a_format_that_heads_cannot_have_is_refused_without_a_recipe(
    key: str, format: str, rule: str, written: Path, tmp_path: Path
) -> None:
    """The config alone decides what runs, and only recipes were checked for this."""
    folder = copied(written, tmp_path / "changed")
    for name in ("recipe.toml", "run.json"):
        (folder / name).unlink()
    assert isinstance(load(folder).lm_head, HeadLinear)
    table = json.loads((folder / "config.json").read_text())
    _both(table, key, {"format": format, "rule": rule})
    (folder / "config.json").write_text(json.dumps(table))
    said = rf"schemes\.head\.{key}: {format} {rule} has no power of two a block; take one of mxfp4, .*mxint8"
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_a_damaged_scale_of_the_head_is_refused(written: Path, tmp_path: Path) -> None:
    folder = copied(written, tmp_path / "changed")
    change_shard(folder, 0, lambda tensors: tensors["lm_head.weight_scale"].fill_(255))
    with pytest.raises(CheckpointError, match=r"lm_head.weight_scale: holds the scale NaN"):
        load(folder, verify=False)


def test_recipes_with_a_head_that_cannot_be_are_refused() -> None:
    refused = {
        "nvfp4": "head: format: nvfp4 absmax has no power of two a block; take one of mxfp4, ",
        "int4_row": "head: format: int4_row absmax has no power of two",
        "mxfp5": "head: format: unknown format 'mxfp5'",
    }
    for name, said in refused.items():
        with pytest.raises(ConfigError, match=said):
            recipe("rtn", head__format=name)
    with pytest.raises(ConfigError, match="head: inputs: nvfp4 absmax has no power of two"):
        recipe("rtn", head__inputs="nvfp4")
    with pytest.raises(ConfigError, match="head: format: mxfp4 log256 has no power of two"):
        recipe("rtn", head__format="mxfp4", head__rule="log256")
    with pytest.raises(ConfigError, match=r"head\.transform: 'moments' is not one of none, hadamard"):
        recipe("rtn", head__transform="moments")
    chosen = recipe("rtn", **HEADS["mxfp8"])
    assert Recipe.from_toml(chosen.to_toml(), "again") == chosen and chosen.formats.endswith("; mxfp8_e4m3 in the head")


def test_a_hidden_size_that_is_no_whole_blocks_is_refused(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "odd", hidden_size=48, head_dim=12)
    chosen = recipe(
        "rtn", head__format="mxint8", ignore=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    )
    with pytest.raises(
        ConfigError, match=r"^lm_head: in_features 48 is not a multiple of the block size 32; leave out"
    ):
        quantize(source, chosen)


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = write_tiny_model(tmp_path / "broken")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises((mxrot.errors.NumericsError, FamilyError), match=r"lm_head\.weight"):
        quantize(source, EIGHT)
