"""A quantized cache: from a recipe to disk and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import TOKENS, WINDOWS, all_tensors, logits, write
from transformers import AutoModelForCausalLM

import mxrot
from mxrot.checkpoint import load
from mxrot.checkpoint.config import compressed_tensors_config
from mxrot.errors import CheckpointError, ConfigError
from mxrot.layers import build_apart, cache_scheme_of
from mxrot.marker import SAVED_BY
from mxrot.models import FAMILIES, find_family
from mxrot.quantizing.problems import find_problems
from mxrot.recipe import Recipe, load_recipe
from mxrot.scheme import Scheme
from mxrot.vllm.verdict import plan_for_vllm

HADAMARD = load_recipe("rtn").changed({"cache.keys": "mxfp4", "cache.transform": "hadamard"})
FITTED = load_recipe("rtn").changed(
    {"cache.keys": "int4_row_asym", "cache.values": "mxfp4", "cache.transform": "second_moment", "cache.last": 4}
)
MATRICES = "model.layers.0.self_attn.key_transform"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source"), dtype=torch.bfloat16, head_dim=32, attention_bias=True)


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    write(source, folder, FITTED, windows=WINDOWS)
    return folder


def copied(folder: Path, copy: Path) -> Path:
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def with_config(folder: Path, copy: Path, change: Any) -> Path:
    copied(folder, copy)
    table = json.loads((copy / "config.json").read_text())
    change(table["quantization_config"])
    (copy / "config.json").write_text(json.dumps(table))
    return copy


def test_a_checkpoint_gives_the_logits_of_the_model(written: Path) -> None:
    loaded = load(written)
    expected = logits(loaded)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)), expected)
    for block in loaded.model.layers:
        scheme = cache_scheme_of(block.self_attn)
        assert scheme is not None and scheme.spelled == (
            "keys int4_row_asym minmax under stored, values mxfp4 even; the last 4 tokens in 16 bit"
        )


def test_matrices_are_float32_in_the_file_and_in_models_of_16_bit(written: Path) -> None:
    stored = all_tensors(written)[MATRICES]
    assert stored.dtype == torch.float32 and stored.shape == (2, 32, 32)
    assert not torch.equal(stored, stored.bfloat16().float())
    theirs = AutoModelForCausalLM.from_pretrained(written, dtype=torch.bfloat16)
    for model in (theirs, load(written, dtype=torch.bfloat16), load(written).to(torch.bfloat16)):
        assert torch.equal(model.state_dict()[MATRICES], stored)
        assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16


def test_what_transformers_has_saved_again_is_the_same(written: Path, tmp_path: Path) -> None:
    expected = logits(load(written))
    AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), expected)


def test_cached_generation_equals_uncached(written: Path) -> None:
    for model in (load(written), AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)):
        options: Any = {"max_new_tokens": 12, "do_sample": False}
        cached = model.generate(TOKENS, **options, use_cache=True)
        assert torch.equal(cached, model.generate(TOKENS, **options, use_cache=False))


def test_what_transformers_quantizes_while_it_loads_has_it_too(tmp_path: Path) -> None:
    """The Hadamard matrix of the values stands in their bias, too."""
    source = write_tiny_model(tmp_path / "source", dtype=torch.float32, head_dim=32, attention_bias=True)
    chosen = mxrot.MxrotConfig(HADAMARD)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=chosen)
    expected = logits(model)
    assert torch.equal(logits(mxrot.quantize(source, HADAMARD, device="cpu")), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)), expected)
    with pytest.raises(ConfigError, match="needs calibration text"):
        mxrot.MxrotConfig(FITTED)


def test_config_and_card_say_it(written: Path) -> None:
    table = json.loads((written / "config.json").read_text())["quantization_config"]
    assert table["kv_cache_scheme"] == {
        "keys": {"format": "int4_row_asym", "rule": "minmax"},
        "values": {"format": "mxfp4", "rule": "even"},
        "first": 0,
        "last": 4,
        "key_transform": "stored",
        "value_transform": "none",
    }
    assert table["mxrot"]["format_version"] == 4 and table["format"] == "mxrot"
    card = (written / "README.md").read_text()
    assert "mxfp4 weights and mxfp4 activations, keys and values in int4_row_asym and mxfp4" in card
    assert "keys int4_row_asym minmax under stored, values mxfp4 even; the last 4 tokens in 16 bit" in card


def test_others_refuse_it_whatever_the_linears_have(source: Path, written: Path) -> None:
    """MXFP4 without a transform is plain compressed-tensors, but for the cache."""
    from compressed_tensors.quantization import QuantizationConfig

    model = build_apart(mxrot.models.read_config(source))
    family = find_family(model.config, "tiny")
    with pytest.raises(ConfigError, match=r"^compressed-tensors: keys and values of attention are quantized$"):
        compressed_tensors_config(Scheme.of(HADAMARD, family, model), family, torch.float16)
    report = plan_for_vllm(model, family, HADAMARD)
    for serving in (report.stock, report.plugin):
        (stop,) = serving.stops
        assert stop.startswith("it quantizes keys and values of attention by blocks, which neither vLLM nor the plugin")
    table = json.loads((written / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="mxrot"):
        QuantizationConfig.model_validate(table)


DAMAGE = {
    "no word of it": (lambda q: q.update(kv_cache_scheme=None), "expected 'mxfp4-pack-quantized', got 'mxrot'"),
    "an older version": (lambda q: q["mxrot"].update(format_version=3), "format_version: expected 4, got 3"),
    "one that is not known": (lambda q: q["mxrot"].update(format_version=6), "6; this mxrot reads versions 1 to 5"),
    "another format": (
        lambda q: q["kv_cache_scheme"].update(values={"format": "mxfp8_e4m3", "rule": "even"}),
        "contradict each other: cache: keys int4.*, values mxfp4 .* in recipe.toml, keys int4.*, values mxfp8_e4m3",
    ),
    "a rule of weights": (
        lambda q: q["kv_cache_scheme"]["values"].update(rule="mse"),
        "kv_cache_scheme.values: rule 'mse' does not apply to inputs",
    ),
    "half a table": (lambda q: q["kv_cache_scheme"].pop("first"), "kv_cache_scheme: expected keys, values, first, "),
    "fewer tokens than none": (lambda q: q["kv_cache_scheme"].update(first=-1), "first: expected a number of tokens"),
    "a transform of another": (
        lambda q: q["kv_cache_scheme"].update(key_transform="fwht"),
        "kv_cache_scheme: cache: key_transform: expected one of none, hadamard, stored, got 'fwht'",
    ),
    "without its matrices": (
        lambda q: q["kv_cache_scheme"].update(key_transform="hadamard"),
        "contradict each other: cache: ",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_config_that_was_changed_is_refused(name: str, written: Path, tmp_path: Path) -> None:
    change, said = DAMAGE[name]
    with pytest.raises(CheckpointError, match=said):
        load(with_config(written, tmp_path / "changed", change), verify=False)


MATRIX_DAMAGE = {
    "gone": (lambda t: t.pop(MATRICES), "key_transform: is missing"),
    "of 16 bit": (lambda t: t.update({MATRICES: t[MATRICES].bfloat16()}), "expected type F32, got BF16"),
    "of one head": (lambda t: t.update({MATRICES: t[MATRICES][:1].clone()}), r"expected shape \[2, 32, 32\]"),
    "singular": (lambda t: t[MATRICES][1].zero_(), "key_transform: holds a matrix that has no inverse"),
    "no number": (lambda t: t[MATRICES][1, 3].fill_(torch.nan), "key_transform: the weights hold NaN or Inf"),
}


@pytest.mark.parametrize("name", MATRIX_DAMAGE)
def test_damaged_matrices_are_refused(name: str, written: Path, tmp_path: Path) -> None:
    change, said = MATRIX_DAMAGE[name]
    folder = copied(written, tmp_path / "damaged")
    tensors = all_tensors(folder)
    for path in (folder / "run.json", folder / "recipe.toml", *folder.glob("*.safetensors*")):
        path.unlink()  # they would tell of any change
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["mxrot"][SAVED_BY] = "transformers"
    (folder / "config.json").write_text(json.dumps(config))
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        load(folder)
    with pytest.raises(CheckpointError, match=said):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cache.keys": "mxfp3"}, "cache: unknown format 'mxfp3'"),
        ({"cache.rule": "mse"}, "cache: keys: rule 'mse' is for weights only"),
        ({"cache.rule": "minmax"}, "cache: format mxfp4 has no scale rule 'minmax'"),
        ({"cache.clip": 0.0}, "cache: clip 0.0 is not above 0"),
        ({"cache.first": -3}, "cache: first: expected a number of tokens, 0 or more, got -3"),
        ({"cache.transform": "random"}, "cache.transform"),
        ({"cache.key": "mxfp4"}, "cache: unknown key 'key'"),
        ({"cache.keys": "mxfp4", "attention.queries_keys": "mxfp4"}, "no attention does both"),
        (
            {"cache.transform": "second_moment", "rotation.residual": "hadamard", "rotation.steps": 3},
            "rotations are trained before the cache's transforms are fitted",
        ),
        (
            {"cache.transform": "hadamard", "rotation.residual": "hadamard", "rotation.steps": 3},
            "set rotation.value_heads, which takes its place",
        ),
    ],
)
def test_a_recipe_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe("rtn").changed(changes)


def test_a_recipe_is_written_and_taken_back() -> None:
    assert Recipe.from_toml(FITTED.to_toml(), "again") == FITTED
    assert FITTED.formats.endswith(
        "; keys int4_row_asym minmax under stored, values mxfp4 even; the last 4 tokens in 16 bit in the cache"
    )
    assert FITTED.changed({"cache": "none"}).cache is None
    assert HADAMARD.is_data_free and not FITTED.is_data_free


def problems(chosen: Recipe, **changes: Any) -> list[str]:
    config = config_of(FAMILIES["llama"], **changes)
    return [str(one) for one in find_problems(build_apart(config), FAMILIES["llama"], chosen, "it")]


def test_a_head_that_is_no_whole_block_is_refused_before_any_weight_is_read(source: Path) -> None:
    (said,) = problems(HADAMARD, head_dim=16)
    assert said.startswith("recipe rtn: cache: heads are 16 wide, which is not a multiple of 32, as mxfp4 need")
    rows = HADAMARD.changed({"cache.keys": "int4_row_asym", "cache.values": "int4_row_asym"})
    assert problems(rows, head_dim=16) == [] and problems(HADAMARD, head_dim=32) == []
    (said,) = problems(rows, head_dim=92, num_attention_heads=8, num_key_value_heads=8)
    assert "cache.transform: " in said and 'set cache.transform to "none"' in said
    assert problems(rows.changed({"cache.transform": "none"}), head_dim=92, num_attention_heads=8) == []
