"""Models whose tensors are not those of their config: understood, or refused by every command alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cases.commands import logits, mxrot, refused
from tests.tiny_model import write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

Tensors = dict[str, Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def change_config(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def words_of(folder: Path) -> Path:
    text = folder.parent / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    return text


def refused_everywhere(folder: Path) -> set[str]:
    """What each command that opens a model says of it."""
    good, text = write_tiny_model(folder.parent / "good", seed=1), words_of(folder)
    measured = ("--text", text, "--seq-len", "64", "--windows", "1")
    made = folder.parent / "made"
    said = {
        refused("quantize", folder, "-r", "rtn", "-o", made),
        refused("eval", folder, *measured),
        refused("eval", good, "--against", folder, *measured),
        refused("compare", folder, "--recipes", "rtn", *measured),
        refused("generate", folder, "ab"),
        refused("inspect", folder, "--text", text, "--seq-len", "64"),
    }
    assert not made.exists()
    planned = mxrot("plan", folder, "-r", "rtn")
    assert planned.exit_code == 1
    assert any(
        line.startswith("refused: ") and line.removeprefix("refused: ") in said for line in planned.stdout.splitlines()
    )
    return said


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda found: {name: value for name, value in found.items() if name != DOWN}, DOWN),
    "missing head": (lambda found: {n: v for n, v in found.items() if n != "lm_head.weight"}, "lm_head.weight"),
    "missing norm": (lambda found: {n: v for n, v in found.items() if n != "model.norm.weight"}, "model.norm.weight"),
    "misnamed": (lambda found: {n.replace("down_proj", "w2"): v for n, v in found.items()}, "down_proj.weight"),
    "misplaced": (lambda found: {n.replace("layers.1", "layers.7"): v for n, v in found.items()}, "layers.1"),
    "unexpected": (lambda found: found | {"mtp.0.weight": torch.ones(2)}, "mtp.0.weight"),
    "transposed": (lambda found: found | {DOWN: found[DOWN].T.contiguous()}, DOWN),
    "an unknown prefix": (lambda found: {f"policy.{name}": value for name, value in found.items()}, "policy."),
}


@pytest.mark.case("B1")
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tensors_are_named(tmp_path: Path, kind: str) -> None:
    change, named = WRONG[kind]
    folder = change_tensors(write_tiny_model(tmp_path / "tiny"), change)
    text = words_of(folder)
    said = {
        refused("quantize", folder, "-r", "rtn", "-o", tmp_path / "out"),
        refused("eval", folder, "--text", text, "--seq-len", "64"),
    }
    planned = mxrot("plan", folder, "-r", "rtn")
    assert len(said) == 1 and named in (line := said.pop()) and planned.exit_code == 1 and line in planned.stdout


@pytest.mark.case("B1")
def test_a_missing_tensor_is_the_same_line_in_every_command(tmp_path: Path) -> None:
    folder = change_tensors(
        write_tiny_model(tmp_path / "tiny"), lambda found: {name: found[name] for name in found if name != DOWN}
    )
    assert [DOWN in line for line in refused_everywhere(folder)] == [True]


PREFIXED: dict[str, Callable[[str], str]] = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "inside": lambda name: name.replace(".self_attn", "._orig_mod.self_attn").replace(
        "mlp", "mlp._fsdp_wrapped_module"
    ),
    "language_model.": lambda name: f"language_model.{name}",
    "model.language_model.": lambda name: name.replace("model.", "model.language_model."),
    "peft": lambda name: f"base_model.model.{name}",
}
NONE = {"none": lambda name: name.removeprefix("model.")}


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.case("B1")) for kind in PREFIXED),
        *(pytest.param(kind, marks=pytest.mark.case("B11")) for kind in NONE),
    ],
)
def test_known_prefixes_are_understood(tmp_path: Path, kind: str) -> None:
    """The same perplexity, and the same checkpoint, as without the prefix."""
    plain = write_tiny_model(tmp_path / "plain")
    rename = (PREFIXED | NONE)[kind]
    other = change_tensors(
        write_tiny_model(tmp_path / "other"), lambda found: {rename(name): value for name, value in found.items()}
    )
    text, figures, shards = words_of(plain), [], []
    for folder in (plain, other):
        scores = folder.with_suffix(".json")
        assert mxrot("eval", folder, "--text", text, "--seq-len", "64", "--json", scores).exit_code == 0
        figures.append(json.loads(scores.read_text())["perplexity"])
        out = folder.with_suffix(".out")
        assert mxrot("plan", folder, "-r", "rtn").exit_code == 0
        assert mxrot("quantize", folder, "-r", "rtn", "-o", out).exit_code == 0
        shards.append([path.read_bytes() for path in sorted(out.glob("*.safetensors"))])
    assert figures[0] == figures[1] and shards[0] == shards[1]


@pytest.mark.case("B1")
def test_names_that_stand_for_one_tensor_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    change_tensors(folder, lambda found: found | {f"_orig_mod.{DOWN}": found[DOWN].clone()})
    assert "stands for the same tensor" in refused("eval", folder, "--text", words_of(folder), "--seq-len", "64")


@pytest.mark.case("B1")
def test_a_head_that_differs_in_a_tied_model_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", tie_word_embeddings=True)
    change_tensors(folder, lambda found: found | {"lm_head.weight": torch.randn(256, 64).half()})
    line = refused("quantize", folder, "-r", "rtn", "-o", tmp_path / "out")
    assert "lm_head.weight differs from model.embed_tokens.weight" in line and "tie_word_embeddings" in line
    assert line == refused("eval", folder, "--text", words_of(folder), "--seq-len", "64")


@pytest.mark.case("B1")
def test_a_head_that_is_the_embedding_is_no_problem(tmp_path: Path) -> None:
    import mxrot as package

    folder = write_tiny_model(tmp_path / "tiny", tie_word_embeddings=True)
    change_tensors(folder, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()})
    package.quantize(folder, "rtn", tmp_path / "out", device="cpu")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(opened), logits(package.load(tmp_path / "out", "cpu")))


FOREIGN: dict[str, tuple[Callable[[Tensors], Tensors], str, str]] = {
    "float8": (lambda t: {n: v.to(torch.float8_e4m3fn) if "proj" in n else v for n, v in t.items()}, "down_proj", "F8"),
    "one float8": (lambda t: t | {DOWN: t[DOWN].to(torch.float8_e5m2)}, DOWN, "F8_E5M2"),
    "int8": (lambda t: {n: v.to(torch.int8) if "proj" in n else v for n, v in t.items()}, "down_proj.weight", "I8"),
    "GPTQ": (lambda t: {n.replace("proj.weight", "proj.qweight"): v.int() for n, v in t.items()}, "", "I32"),
    "bitsandbytes": (lambda t: t | {DOWN.replace("weight", "SCB"): torch.ones(64)}, "SCB", "F32"),
    "scales": (lambda t: t | {f"{DOWN}_scale": torch.ones(1)}, "weight_scale", "F32"),
    "bool": (lambda t: t | {NORM: torch.ones(64, dtype=torch.bool)}, NORM, "BOOL"),
}


@pytest.mark.case("B4")
@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_of_a_quantized_model_without_a_config_are_named(tmp_path: Path, kind: str) -> None:
    change, named, stored = FOREIGN[kind]
    folder = change_tensors(write_tiny_model(tmp_path / "tiny"), change)
    line = refused("quantize", folder, "-r", "rtn", "-o", tmp_path / "out")
    assert named in line and f"stored as {stored}" in line and "quantized already" in line
    assert line == refused("eval", folder, "--text", words_of(folder), "--seq-len", "64")
    planned = mxrot("plan", folder, "-r", "rtn")
    assert planned.exit_code == 1 and f"refused: {line}" in planned.stdout


@pytest.mark.case("B4")
def test_a_modelopt_folder_is_named(tmp_path: Path) -> None:
    folder = change_tensors(write_tiny_model(tmp_path / "tiny"), FOREIGN["float8"][0])
    (folder / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}, "quantization": {}}')
    line = refused("quantize", folder, "-r", "rtn", "-o", tmp_path / "out")
    assert "hf_quant_config.json" in line and "F8_E4M3" in line
    assert f"refused: {line}" in mxrot("plan", folder, "-r", "rtn").stdout


@pytest.mark.case("B4")
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_config_that_says_so_is_one_line_in_plan_too(tmp_path: Path, key: str) -> None:
    folder = change_config(write_tiny_model(tmp_path / "tiny"), **{key: {"quant_method": "fp8"}})
    line = refused("quantize", folder, "-r", "rtn", "-o", tmp_path / "out")
    assert "is quantized already" in line and f"refused: {line}" in mxrot("plan", folder, "-r", "rtn").stdout


@pytest.mark.case("G4")
@pytest.mark.parametrize("blocks", [1_000_000, 3, 1, 0, -1, "2", 2.5, None])
def test_the_number_of_blocks_is_compared_with_the_files(tmp_path: Path, blocks: object) -> None:
    folder = change_config(write_tiny_model(tmp_path / "tiny"), num_hidden_layers=blocks)
    line = refused("quantize", folder, "-r", "rtn", "-o", tmp_path / "out")
    assert "num_hidden_layers" in line
    assert line == refused("eval", folder, "--text", words_of(folder), "--seq-len", "64")
    assert mxrot("plan", folder, "-r", "rtn").exit_code in (1, 2)


@pytest.mark.case("G4")
@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**6}, {"vocab_size": 10**15}, {"vocab_size": -1}], ids=str)
def test_a_plan_from_a_config_alone_does_not_hang(tmp_path: Path, changes: dict[str, int]) -> None:
    folder = change_config(write_tiny_model(tmp_path / "tiny"), **changes)
    planned = mxrot("plan", folder / "config.json", "-r", "rtn")
    assert planned.exception is None or isinstance(planned.exception, SystemExit)


@pytest.mark.case("B1")
@pytest.mark.parametrize("prefix", [None, "_orig_mod."])
def test_quantizing_what_transformers_loads_takes_no_random_numbers(tmp_path: Path, prefix: str | None) -> None:
    """`from_pretrained(..., quantization_config=MxrotConfig(...))` of a model in which transformers misses tensors."""
    import mxrot as package
    from mxrot.errors import FamilyError

    folder = write_tiny_model(tmp_path / "tiny")
    if prefix is None:
        change_tensors(folder, lambda found: {name: found[name] for name in found if name != DOWN})
    else:
        change_tensors(folder, lambda found: {prefix + name: value for name, value in found.items()})
    with pytest.raises(FamilyError, match=DOWN if prefix is None else prefix):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=package.MxrotConfig("rtn"))


@pytest.mark.case("B1")
def test_a_model_quantized_in_a_way_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    """transformers leaves the quantization out, with a warning."""
    folder = change_config(write_tiny_model(tmp_path / "tiny"), quantization_config={"quant_method": "modelopt"})
    line = refused("eval", folder, "--text", words_of(folder), "--seq-len", "64")
    assert "quantized in a way that transformers does not know" in line
