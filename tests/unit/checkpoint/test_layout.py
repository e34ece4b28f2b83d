"""What a config says is installed, and run.json as tables take it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config
from tests.unit.checkpoint.folders import logits, recipe, write
from transformers import PreTrainedModel

from mxrot.checkpoint import load, read_run
from mxrot.checkpoint.agreement import check_layout, check_recipe
from mxrot.checkpoint.config import compressed_tensors_config, native_config, why_unfaithful
from mxrot.checkpoint.layout import read_layout
from mxrot.errors import CheckpointError
from mxrot.layers import build_apart
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.recipe import builtin_recipes
from mxrot.scheme import Scheme


@pytest.mark.parametrize("name", [name for name in sorted(builtin_recipes()) if "released" not in name])
def test_what_is_written_is_read(name: str) -> None:
    """In both forms, where there are two."""
    chosen, model = recipe(name, ignore=["q_proj"]), skeleton()
    scheme = Scheme.of(chosen, LLAMA, model)
    assert scheme.left == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    forms = [native_config(scheme, LLAMA, torch.bfloat16)]
    if why_unfaithful(scheme) is None:
        forms.append(compressed_tensors_config(scheme, LLAMA, torch.bfloat16))
    for form in forms:
        table = json.loads(json.dumps(form))
        layout = read_layout(table)
        assert layout.dtype == torch.bfloat16
        found = layout.scheme(LLAMA, 2)
        assert found == scheme
        check_layout(table, layout, found, LLAMA)
        check_layout(table | {"version": "1.0"}, layout, found, LLAMA)  # of other programs
        check_recipe(Scheme.of(chosen, LLAMA, model), found, LLAMA)
        with pytest.raises(CheckpointError, match=r"0\.self_attn\.q_proj is unquantized in config\.json only"):
            check_recipe(Scheme.of(recipe(name), LLAMA, model), found, LLAMA)


def skeleton() -> PreTrainedModel:
    return build_apart(tiny_config(architectures=["LlamaForCausalLM"]))


def version_1(folder: Path, sharing: str, has_accumulation: bool) -> None:
    """Let the config.json of a checkpoint be as the first version wrote it."""
    arguments = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "symmetric": True,
        "dynamic": False,
        "group_size": 32,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
        "actorder": None,
        "block_structure": None,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
    }
    sites = {
        "qkv": r"self_attn\.q_proj|self_attn\.k_proj|self_attn\.v_proj",
        "o": r"self_attn\.o_proj",
        "gate_up": r"mlp\.gate_proj|mlp\.up_proj",
        "down": r"mlp\.down_proj",
    }
    transforms = {}
    for index in (0, 1):
        for site, names in sites.items():
            target = rf"re:(?:.*\.)?model\.layers\.{index}\.(?:{names})$"
            places = (("input", False), ("weight_input", True))
            apply = [{"targets": [target], "location": p, "inverse": i, "ignore": []} for p, i in places]
            other = {"randomize": False, "requires_grad": False, "head_dim": 32, "precision": "torch.bfloat16"}
            transforms[f"layer{index}_{site}"] = {"type": "random-hadamard", "apply": apply, **other}
    marker = {"format_version": 1, "activation_rule": "even", "sharing": sharing}
    table = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": arguments,
                "input_activations": {**arguments, "dynamic": True, "observer": None},
                "output_activations": None,
                "format": "mxfp4-pack-quantized",
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "mxrot": marker | ({"accumulation": "exact"} if has_accumulation else {}),
        "transform_config": {"config_groups": transforms},
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": table}))


@pytest.mark.parametrize(
    ("name", "sharing", "has_accumulation"),
    [("hadamard", "site", False), ("hadamard", "block", True), ("duquant++", "block", True)],
)
def test_the_first_version_is_read(
    source: Path, tmp_path: Path, name: str, sharing: str, has_accumulation: bool
) -> None:
    """It had no word for the number of matrices, and at first none for how products are summed."""
    chosen = recipe(name, transform__sharing=sharing, weights__rule="mse")
    write(source, tmp_path / "out", chosen)
    expected = logits(load(tmp_path / "out"))
    version_1(tmp_path / "out", sharing, has_accumulation)
    assert torch.equal(logits(load(tmp_path / "out", verify=False)), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["mxrot"]["activation_rule"] = "floor"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"activations mxfp4 even in recipe\.toml, mxfp4 floor in config\.json"):
        load(tmp_path / "out", verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.pop("size"), "has no 'size'"),
        (lambda run: run.update(seed="x"), "seed: expected int, got 'x'"),
        (lambda run: run.update(seed=True), "seed: expected int, got True"),
        (lambda run: run["blocks"][0].pop("linears"), "blocks: has no 'linears'"),
        (lambda run: run["blocks"][0]["linears"][0].update(shape=[1]), r"a linear has the shape \[1\]"),
        (lambda run: run.update(blocks=[5]), "blocks: expected dict, got 5"),
    ],
)
def test_a_record_that_no_table_can_take(source: Path, tmp_path: Path, change: Any, message: str) -> None:
    write(source, tmp_path / "out", recipe("rtn"))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert read_run(tmp_path / "out") == run
    change(run)
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match=message):
        read_run(tmp_path / "out")
