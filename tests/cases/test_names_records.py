"""What a run says of itself is what it did."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.cases.commands import mxrot
from tests.tiny_model import write_tiny_mixture, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("records") / "model")


def quantized(model: Path, output: Path, *words: str) -> tuple[dict[str, Any], str, str]:
    """run.json, the card and what was printed."""
    result = mxrot("quantize", model, "-o", output, "--device", "cpu", *words)
    assert result.exit_code == 0, result.output
    return json.loads((output / "run.json").read_text()), (output / "README.md").read_text(), result.stdout


def stored(folder: Path) -> dict[str, tuple[int, int]]:
    """Elements and bytes of every tensor of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(name)
                found[name] = (tensor.numel(), tensor.nbytes)
    return found


@pytest.mark.case("D1")
@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("down_proj", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        ("model.layers.0.mlp.*", [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]),
    ],
)
def test_what_was_left_as_it_was_is_what_is_stored_so(
    model: Path, tmp_path: Path, pattern: str, left: list[str]
) -> None:
    words = ("--recipe", "rtn", "--set", f'ignore=["{pattern}", "lm_head"]')
    run, card, said = quantized(model, tmp_path / "out", *words)
    tensors = stored(tmp_path / "out")
    assert run["left_alone"]["linears"] == ["lm_head", *left]
    assert {f"{name}.weight" for name in run["left_alone"]["linears"]} <= tensors.keys()
    taken = sum(tensors[f"{name}.weight"][1] for name in run["left_alone"]["linears"])
    assert run["left_alone"]["bytes"] == taken
    assert run["left_alone"]["share_of_bytes"] == pytest.approx(taken / sum(size for _, size in tensors.values()))
    short = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in left)
    for text in (card, said):
        line = next(line for line in text.splitlines() if "left as they were: " in line)
        assert all(name in line for name in ("lm_head", *short)), line


@pytest.mark.case("D1")
def test_bits_a_weight_are_those_of_the_mixture(model: Path, tmp_path: Path) -> None:
    run, card, said = quantized(model, tmp_path / "out", "--recipe", "rtn", "--set", 'ignore=["down_proj"]')
    inner = {name: size for name, size in stored(tmp_path / "out").items() if "_proj." in name}
    weights = sum(
        count * (2 if name.endswith("_packed") else 1) for name, (count, _) in inner.items() if "scale" not in name
    )
    bits = 8 * sum(size for _, size in inner.values()) / weights
    assert 6 < bits < 8 and run["size"]["bits_per_weight"] == pytest.approx(bits)
    assert f"({bits:.3f} bits a weight" in said and f"| {bits:.3f} |" in card
    whole, _, plain = quantized(model, tmp_path / "whole", "--recipe", "rtn")
    assert whole["size"]["bits_per_weight"] == 4.25 and "(4.250 bits a weight)" in plain


@pytest.mark.case("D1")
def test_plan_counts_the_same_mixture(model: Path, tmp_path: Path) -> None:
    words = ("--recipe", "rtn", "--set", 'ignore=["down_proj"]')
    run, _, _ = quantized(model, tmp_path / "out", *words)
    refused = (*words, "--set", 'smoothing.skip=["nothing"]', "--set", "smoothing.alpha=0.5")  # measures no time
    mxrot("plan", model, *refused, "--device", "cpu", "--json", tmp_path / "plan.json")
    planned = json.loads((tmp_path / "plan.json").read_text())["size"]["after"]
    assert {key: planned[key] for key in run["size"]} == run["size"]


@pytest.mark.case("D1")
def test_a_model_with_a_tied_head_leaves_no_linear_as_it_was(tmp_path: Path) -> None:
    tied = write_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    run, card, said = quantized(tied, tmp_path / "out", "--recipe", "rtn")
    assert run["left_alone"] == {"linears": [], "bytes": 0, "share_of_bytes": 0.0}
    assert "All linears are quantized" in card and "left as they were" not in said


FEW = ("--recipe", "hadamard", "--set", "rounding.method=gptq", "--calib")


@pytest.mark.case("F16")
def test_fewer_tokens_than_channels_are_said(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("A text that is short, and yet long enough for a few windows of it. " * 20)
    run, _, said = quantized(model, tmp_path / "few", *FEW, str(text), "--samples", "2", "--seq-len", "40")
    linears = [linear for block in run["blocks"] for linear in block["linears"]]
    assert {linear["tokens"] for linear in linears} == {80}
    line = next(line for line in said.splitlines() if line.startswith("fewer calibration tokens than inputs"))
    assert "2 of 14 linears (model.layers.*.mlp.down_proj (2); 80 tokens for 96 inputs)" in line
    run, _, said = quantized(model, tmp_path / "many", *FEW, str(text), "--samples", "4", "--seq-len", "40")
    assert "fewer calibration tokens" not in said
    plain, _, _ = quantized(model, tmp_path / "plain", "--recipe", "rtn")
    assert {linear["tokens"] for block in plain["blocks"] for linear in block["linears"]} == {None}


@pytest.mark.case("F16")
def test_tokens_of_experts_are_counted(tmp_path: Path) -> None:
    """Those that are sent to an expert, or those of the block where these are too few."""
    model = write_tiny_mixture(tmp_path / "moe", "mixtral")
    text = tmp_path / "words.txt"
    text.write_text("A text that is short, and yet long enough for a few windows of it. " * 40)
    run, _, _ = quantized(model, tmp_path / "out", *FEW, str(text), "--samples", "8", "--seq-len", "64")
    counts = {x["name"]: x["tokens"] for block in run["blocks"] for x in block["linears"]}
    experts = [count for name, count in counts.items() if name.startswith("model.layers.1") and ".experts." in name]
    assert counts["model.layers.0.self_attn.q_proj"] == 512
    assert any(96 <= count < 512 for count in experts), experts
    idle = [count for name, count in counts.items() if name.startswith("model.layers.0.mlp.experts.3.")]
    assert idle == [512] * 3


@pytest.mark.case("F16")
def test_plan_says_it_before(model: Path) -> None:
    words = (*FEW[:4], "--samples", "2", "--seq-len", "40", "--set", 'ignore=["nothing"]', "--device", "cpu")
    said = mxrot("plan", model, *words).stdout
    assert "warning: 80 calibration tokens are fewer than the 96 inputs" in said
    assert "calibration tokens are fewer" not in mxrot("plan", model, *words, "--set", "rounding.method=rtn").stdout
