"""Folders that hold no model, two models, or half of one: one line that says what they are and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cases.commands import logits, mxrot, refused
from tests.tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"
INDEX = "model.safetensors.index.json"


def write_sharded(folder: Path, seed: int = 0) -> Path:
    whole = write_tiny_model(folder.with_name(f"{folder.name}-whole"), seed=seed)
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="50KB")
    shutil.rmtree(whole)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def the_line(folder: Path) -> str:
    """What `quantize` says; `eval` and `plan` say the same."""
    text = folder.parent / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    line = refused("quantize", folder, "-r", "rtn", "-o", folder.with_suffix(".out"))
    assert refused("eval", folder, "--text", text, "--seq-len", "64") == line
    planned = mxrot("plan", folder, "-r", "rtn")
    assert planned.exit_code in (1, 2) and line in planned.stdout + planned.stderr
    return line


@pytest.mark.case("B2")
def test_a_stale_index_beside_a_newer_file(tmp_path: Path) -> None:
    """The shards of the index are another model than model.safetensors, which transformers reads."""
    folder = write_sharded(tmp_path / "tiny")
    newer = write_tiny_model(tmp_path / "newer", seed=1)
    shutil.copy(newer / "model.safetensors", folder)
    line = the_line(folder)
    assert "model.safetensors" in line and INDEX in line and "transformers" in line


@pytest.mark.case("B2")
@pytest.mark.parametrize("kind", ["shards are gone", "one shard is gone", "the same tensors"])
def test_an_index_that_is_of_no_account(tmp_path: Path, kind: str) -> None:
    """The model is that of transformers."""
    import mxrot as package

    folder, single = write_sharded(tmp_path / "tiny"), write_tiny_model(tmp_path / "single")
    shards = sorted(folder.glob("*.safetensors"))
    for path in {"shards are gone": shards, "one shard is gone": shards[:1], "the same tensors": []}[kind]:
        path.unlink()
    shutil.copy(single / "model.safetensors", folder)
    package.quantize(folder, "rtn", tmp_path / "out", device="cpu")
    package.quantize(single, "rtn", tmp_path / "expected", device="cpu")
    found, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("out", "expected")
    )
    assert found == expected


@pytest.mark.case("B2")
def test_broken_sets_of_shards(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "tiny")
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = next(name for name, file in index["weight_map"].items() if file == first.name)

    def with_map(**changes: str) -> None:
        table = index["weight_map"] | {key.replace("__", "."): value for key, value in changes.items()}
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": table}))

    with_map(**{name: second.name})
    assert name in (line := the_line(folder)) and second.name in line
    for outside in ("../other.safetensors", str(first), "C:/model.safetensors"):
        with_map(**{name: outside})
        assert "expected a safetensors file in its folder" in the_line(folder)
    with_map(**{name: "model-00099-of-00099.safetensors"})
    assert "model-00099-of-00099.safetensors: is named in" in the_line(folder)
    with_map()
    save_file(load_file(second) | {name: load_file(first)[name]}, second, {"format": "pt"})
    assert f"{name} is in {first.name} and in {second.name}" in the_line(folder)
    (folder / INDEX).unlink()
    assert f"lack their {INDEX}" in the_line(folder)


@pytest.mark.case("B3")
def test_an_adapter_beside_the_weights(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    line = the_line(folder)
    assert "adapter_config.json" in line and "owner/base" in line and "merge it first" in line
    assert "merge it first" in refused("generate", folder, "ab")
    assert "merge it first" in refused("compare", folder, "--recipes", "rtn")


def _only(folder: Path, name: str, content: bytes = b"GGUF") -> Path:
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder


def _with_config(folder: Path, name: str) -> Path:
    write_tiny_model(folder)
    (folder / "model.safetensors").rename(folder / name)
    return folder


@pytest.mark.case("F1")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: _only(f, "adapter_config.json", b'{"base_model_name_or_path": "a/b"}'), "for a/b.* merge it first"),
        (lambda f: _only(f, "adapter_model.safetensors"), "merge it first"),
        (lambda f: _only(f, "model-Q4_K_M.gguf"), "model-Q4_K_M.gguf is for llama.cpp"),
        (lambda f: _with_config(f, "model.gguf"), "model.gguf is for llama.cpp"),
        (lambda f: _with_config(f, "pytorch_model.bin"), "pytorch_model.bin would have to be unpickled.*convert it"),
        (lambda f: _with_config(f, "consolidated.safetensors"), "Mistral's own layout"),
        (
            lambda f: _with_config(f, "weights.safetensors"),
            "weights.safetensors is not a name .* call it model.safeten",
        ),
        (lambda f: _with_config(f, "model.onnx"), "model.onnx is for ONNX"),
        (lambda f: _with_config(f, "flax_model.msgpack"), "flax_model.msgpack is for Flax"),
        (lambda f: _only(f, "model_index.json", b"{}"), "diffusers pipeline"),
        (lambda f: write_tiny_model(f / "inner") and f, "did you mean .*inner"),
    ],
    ids=[
        "LoRA",
        "LoRA weights",
        "GGUF",
        "GGUF and config",
        "bin",
        "consolidated",
        "name",
        "onnx",
        "flax",
        "diffusers",
        "outer",
    ],
)
def test_what_a_folder_is(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    import re

    assert re.search(said, the_line(make(tmp_path / "tiny")))


@pytest.mark.case("F1")
def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "llama.cpp" in refused("quantize", tmp_path / "model.gguf", "-o", tmp_path / "out")
    line = refused("eval", folder / "model.safetensors")
    assert "is a file" in line and f"give its folder: {folder}" in line


@pytest.mark.case("F2")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    (folder / name).write_text(POINTER)
    line = refused("eval", folder)
    assert f"{folder / name}: is a git-lfs pointer" in line and "git lfs pull" in line


@pytest.mark.case("F2")
def test_a_shard_that_is_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "tiny")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_text(POINTER)
    assert f"{shard}: is a git-lfs pointer" in the_line(folder)


@pytest.mark.case("F3")
@pytest.mark.parametrize("kind", ["none", "only its config", "damaged"])
def test_a_missing_tokenizer_is_a_whole_sentence(tmp_path: Path, kind: str) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    for path in folder.glob("tokenizer*"):
        if kind == "none" or (kind == "only its config" and path.name == "tokenizer.json"):
            path.unlink()
        elif path.name == "tokenizer.json":
            path.write_text("{}")
    for words in (("quantize", folder, "-o", tmp_path / "out"), ("eval", folder), ("generate", folder, "ab")):
        line = refused(*words)
        assert str(folder) in line and "tokenizer.json" in line and not line.endswith(":")


@pytest.mark.case("B2")
def test_the_file_that_the_config_names_is_read(tmp_path: Path) -> None:
    """As transformers does it (`transformers_weights`)."""
    folder, other = write_tiny_model(tmp_path / "tiny"), write_tiny_model(tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    for name in ("tiny", "other"):
        assert mxrot("quantize", tmp_path / name, "-r", "rtn", "-o", tmp_path / f"{name}-out").exit_code == 0
    found, expected = (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-out", dtype=torch.float32))
        for name in ("tiny", "other")
    )
    assert torch.equal(found, expected)


@pytest.mark.case("F1")
@pytest.mark.parametrize("kind", ["a named pipe", "a folder", "a link to nothing", "an empty file"])
def test_what_has_the_name_of_weights_and_is_none(tmp_path: Path, kind: str) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.unlink()
    {
        "a named pipe": lambda: os.mkfifo(weights),
        "a folder": weights.mkdir,
        "a link to nothing": lambda: weights.symlink_to(tmp_path / "nothing"),
        "an empty file": weights.touch,
    }[kind]()
    said = {"a link to nothing": "cannot be read", "an empty file": "cannot be read as safetensors"}.get(kind, kind)
    assert (line := the_line(folder)).startswith(f"{weights}: ") and said in line
