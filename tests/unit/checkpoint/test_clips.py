"""Checkpoints whose weights or inputs are clipped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.checkpoint.folders import logits, recipe, windows_for, write
from transformers import AutoModelForCausalLM

from mxrot import quantizing
from mxrot.checkpoint import load
from mxrot.checkpoint.checked import check_checkpoint
from mxrot.checkpoint.config import why_unfaithful
from mxrot.errors import CheckpointError
from mxrot.evaluation import quantizers
from mxrot.layers import QuantLinear
from mxrot.recipe import Recipe
from mxrot.vllm.verdict import check_for_vllm

NO_WORD = "it has no word for inputs that are clipped (mxfp4 even clip 0.9)"


def clipped(name: str = "rtn", **changes: Any) -> Recipe:
    return recipe(name, weights__clip=0.8, **changes)


@pytest.mark.parametrize("name", ["rtn", "hadamard", "duquant++-gptq"])
@pytest.mark.parametrize(
    "changes",
    [
        {"activations__clip": 0.9},
        {"weights__format": "int4_row_asym", "weights__rule": "minmax"}
        | {"activations__format": "int4_row_asym", "activations__rule": "minmax", "activations__clip": 0.9},
    ],
    ids=["mxfp4", "int4"],
)
def test_it_is_loaded_as_it_was_made(source: Path, tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    chosen = clipped(name, **changes)
    write(source, tmp_path / "out", chosen)
    made = quantizing.quantize(source, chosen, windows=windows_for(chosen)).model
    assert made is not None
    expected = logits(made)
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(theirs), expected)
    for section in ("weights", "activations"):
        unclipped = chosen.changed({f"{section}.clip": 1.0})
        other = quantizing.quantize(source, unclipped, windows=windows_for(unclipped)).model
        assert other is not None and not torch.equal(logits(other), expected)


def test_clipped_weights_are_a_choice_of_scales(source: Path, tmp_path: Path) -> None:
    """Stock runtimes read the scales that are there."""
    write(source, tmp_path / "out", clipped())
    checked = check_checkpoint(tmp_path / "out")
    assert why_unfaithful(checked.scheme) is None
    assert checked.quantization["format"] == "mxfp4-pack-quantized"
    assert checked.quantization["mxrot"]["schemes"]["group_0"]["weights"] == {
        "format": "mxfp4",
        "rule": "even",
        "clip": 0.8,
    }
    assert checked.quantization["mxrot"]["schemes"]["group_0"]["activations"] == {"format": "mxfp4", "rule": "even"}
    assert check_for_vllm(tmp_path / "out").stock.stops == ()


def test_clipped_inputs_are_nothing_that_a_stock_runtime_computes(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", recipe("rtn", activations__clip=0.9))
    checked = check_checkpoint(tmp_path / "out")
    assert why_unfaithful(checked.scheme) == NO_WORD
    assert checked.quantization["format"] == "mxrot"
    for name, module in load(tmp_path / "out").named_modules():
        if isinstance(module, QuantLinear):
            assert "inputs are clipped" in module.choose_path(1).reason, name
    (stop,) = check_for_vllm(tmp_path / "out").stock.stops
    assert NO_WORD in stop and "install mxrot where vLLM runs" in stop
    assert check_for_vllm(tmp_path / "out").plugin.stops == ()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no word for inputs that are clipped" in card and "`even clip 0.9`" in card


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("0.9", r"expected a number for the clip, got '0\.9'$"),
        (2.0, r"clip 2\.0 is not above 0 and at most 1$"),
        (1.0, r"expected \{.*, got \{.*'clip': 1\.0"),
        (0.7, r"weights mxfp4 even 0\.8 in recipe\.toml, mxfp4 even 0\.7 in config\.json"),
    ],
)
def test_a_clip_that_is_none_or_another(source: Path, tmp_path: Path, clip: Any, message: str) -> None:
    write(source, tmp_path / "out", clipped(activations__clip=0.9))
    file = tmp_path / "out" / "config.json"
    table = json.loads(file.read_text())
    group = table["quantization_config"]
    group["mxrot"]["schemes"]["group_0"]["weights"]["clip"] = clip
    group["config_groups"]["group_0"]["weights"]["clip"] = clip
    file.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "out", verify=False)


def test_what_is_clipped_is_seen_in_a_model(source: Path) -> None:
    chosen = recipe("rtn", weights__clip=0.8, activations__clip=0.9)
    model = quantizing.quantize(source, chosen).model
    assert model is not None
    assert quantizers(model) == {"weights mxfp4 even clip 0.8, inputs mxfp4 even clip 0.9": 14}
