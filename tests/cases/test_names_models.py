"""Models that are refused: what is said of them; and what a report draws of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cases.commands import mxrot, refused
from tests.tiny_model import tiny_config, write_tiny_model


@pytest.mark.case("F4")
@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://huggingface.co/owner/name/tree/main", "owner/name"),
        ("https://hf.co/owner/name", "owner/name"),
        ("s3://bucket/model", "a folder on this machine"),
        ("file:///tmp/model", "a folder on this machine"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "plan", "inspect", "export"])
def test_a_url_for_a_model(command: str, url: str, meant: str) -> None:
    said = refused(command, url)
    assert said.startswith(f"{url}: is a URL; ") and said.partition("; ")[2].count(meant) == 1
    assert "Getting" not in mxrot(command, url).stderr


@pytest.mark.case("F4")
@pytest.mark.parametrize("option", ["--text", "--calib"])
def test_a_url_for_a_text_is_printed_as_it_was_given(option: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    words = ("eval", model) if option == "--text" else ("quantize", model, "-o", tmp_path / "out")
    for url in ("https://x/a.txt", "s3://bucket/b.jsonl"):
        assert url in refused(*words, option, url, "--device", "cpu")


@pytest.mark.case("F4")
def test_a_url_for_a_recipe(tmp_path: Path) -> None:
    assert "'https://x/mine.toml'" in refused("plan", "demo", "--recipe", "https://x/mine.toml")


def write_config(folder: Path, **changes: Any) -> Path:
    """A config.json alone."""
    folder.mkdir()
    table = tiny_config().to_dict() | {"architectures": ["LlamaForCausalLM"]} | changes
    (folder / "config.json").write_text(json.dumps(table))
    return folder


def refused_plan(place: Path) -> str:
    """The reason in a plan of a model that would be refused."""
    result = mxrot("plan", place, "--device", "cpu")
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    return line


MIXED = ["full_attention", "sliding_attention"]


@pytest.mark.case("F5")
def test_layer_types_that_a_family_does_not_mix(tmp_path: Path) -> None:
    changes = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8}
    said = refused_plan(write_config(tmp_path / "mixed", layer_types=MIXED, **changes))
    assert "layer_types mixes full_attention (decoder block 0) and sliding_attention (decoder block 1)" in said
    assert "family mistral all blocks must be of one type" in said and "expected" not in said


@pytest.mark.case("F5")
@pytest.mark.parametrize(
    "kinds", [["full_attention", "linear_attention"], ["chunked_attention"] * 2], ids=["linear", "chunked"]
)
def test_a_layer_type_that_is_not_known(tmp_path: Path, kinds: list[str]) -> None:
    changes = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "sliding_window": 8}
    said = refused_plan(write_config(tmp_path / "odd", layer_types=kinds, **changes))
    index = next(i for i, kind in enumerate(kinds) if "full" not in kind)
    assert f"decoder block {index} is of type '{kinds[index]}'" in said and "full_attention" in said


@pytest.mark.case("F6")
@pytest.mark.parametrize("extra", ["mtp.layers.0.weight", "model.mtp_layers.0.proj.weight", "visual.patch.weight"])
def test_extra_tensors_and_what_to_do_with_them(tmp_path: Path, extra: str) -> None:
    model = write_tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {extra: torch.zeros(4)}, model / "model.safetensors", {"format": "pt"})
    said = refused("quantize", model, "-o", tmp_path / "out", "--recipe", "rtn", "--device", "cpu")
    assert extra in said and "save_pretrained" in said
    assert f"refused: {said}" in mxrot("plan", model, "--recipe", "rtn", "--device", "cpu").stdout


@pytest.mark.case("D1")
def test_an_architecture_that_is_not_known_is_told_the_nearest_ones(tmp_path: Path) -> None:
    said = refused_plan(write_config(tmp_path / "odd", architectures=["Qwen4ExpForCausalLM"]))
    known = said.partition("known architectures: ")[2].split(", ")
    assert known[0] in ("Qwen3ForCausalLM", "Qwen3NextForCausalLM") and "Qwen2ForCausalLM" in known


ODD_CONFIGS: dict[str, dict[str, Any]] = {
    "remote code": {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "model_type": "own"},
    "no architecture": {"architectures": None},
    "a number as architecture": {"architectures": [5]},
    "not causal": {"architectures": ["BertModel"], "model_type": "bert"},
    "a model type of nobody": {"model_type": "nobody", "architectures": ["NobodyForCausalLM"]},
    "an architecture of no family": {"model_type": "jamba", "architectures": ["JambaForCausalLM"]},
    "quantized": {"quantization_config": {"quant_method": "fp8"}},
    "odd sizes": {"hidden_size": 80, "head_dim": 20},
    "a width of nothing": {"hidden_size": 0},
    "negative": {"intermediate_size": -32},
    "text in place of a number": {"hidden_size": "64"},
    "rope that nobody knows": {"rope_scaling": {"rope_type": "nobody", "factor": 2.0}},
    "layer types that are numbers": {"layer_types": [1, 2]},
    "too few layer types": {"layer_types": ["full_attention"]},
    "an activation of nobody": {"hidden_act": "nobody"},
}


@pytest.mark.case("F5")
@pytest.mark.parametrize("changes", ODD_CONFIGS.values(), ids=ODD_CONFIGS)
def test_plan_of_any_config_is_one_table_or_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    result = mxrot("plan", write_config(tmp_path / "odd", **changes), "--device", "cpu")
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    lines = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    errors = [line for line in result.stderr.splitlines() if line.startswith("mxrot: error: ")]
    assert (result.exit_code, len(errors)) == ((2, 1) if errors else (1, 0))
    assert errors or lines
    assert not any("unexpected" in line or "fault of mxrot" in line for line in errors)


@pytest.mark.case("F5")
def test_code_of_its_own_and_types_of_nobody_are_said(tmp_path: Path) -> None:
    own = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    assert "code of its own (auto_map), which is never run" in refused("plan", write_config(tmp_path / "own", **own))
    assert "not known to transformers 5" in refused("plan", write_config(tmp_path / "new", model_type="nobody"))


@pytest.mark.case("F14")
@pytest.mark.parametrize("bins", [1, 2, 3, 6, 12, 40])
def test_axes_of_less_than_a_decade_have_ticks(bins: int) -> None:
    """A bin is a quarter of an octave: 13 of them are a decade."""
    from matplotlib.figure import Figure

    from mxrot.evaluation import ActivationView
    from mxrot.report.activation_plots import draw_block_maxima, draw_magnitudes
    from mxrot.report.drawing import LIGHT

    for start in range(100, 113, 3):
        maxima = torch.zeros(240, dtype=torch.int64)
        maxima[start : start + bins] = 5
        view = ActivationView(torch.full((4, 8), 2.0), 8, maxima, torch.ones(8), torch.ones(4), 2.0, 1.3, 1.0, 0.1)
        for draw in (draw_block_maxima, draw_magnitudes):
            figure = Figure()
            draw(figure, LIGHT, (view, view))
            figure.canvas.draw()
            axes = figure.axes[-1]
            low, high = axes.get_xlim()
            labels = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            assert len([label for at, label in labels if low <= at <= high and label.get_text()]) >= 2
