"""Damaged checkpoints: one line, through mxrot, transformers and the commands; never another model."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cases.commands import logits, refused
from tests.cases.commands import mxrot as command
from tests.tiny_model import write_tiny_model, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import mxrot
from mxrot.errors import CheckpointError

SHARD = "model-00002-of-00003.safetensors"
DOWN = "model.layers.0.mlp.down_proj"
TRANSFORM = "model.layers.0.self_attn.q_proj.layer0_qkv_input.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`written` by mxrot, and `saved` by save_pretrained."""
    root = tmp_path_factory.mktemp("checkpoints")
    source = write_tiny_model(root / "tiny", bos_token_id=0)
    mxrot.quantize(str(source), "hadamard", str(root / "written"), device="cpu")
    mxrot.load(root / "written", "cpu").save_pretrained(root / "saved")
    write_tokenizer(root / "saved")
    return root


@pytest.fixture(params=["written", "saved"])
def folder(root: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(root / request.param, tmp_path / "out"))


@pytest.fixture
def written(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "written", tmp_path / "out"))


def unsigned(folder: Path) -> Path:
    """run.json and the index made to fit what the files hold, as if nothing could be told by them."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    if (folder / "run.json").exists():
        run = json.loads((folder / "run.json").read_text())
        for name, entry in run["files"].items():
            data = (folder / name).read_bytes()
            entry.update(bytes=len(data), sha256=sha256(data).hexdigest())
        (folder / "run.json").write_text(json.dumps(run))
    return folder


def shard_with(folder: Path, name: str) -> Path:
    return next(path for path in sorted(folder.glob("*.safetensors")) if name in load_file(path))


def change(folder: Path, name: str, how: Callable[[dict[str, Tensor]], object]) -> Path:
    path = shard_with(folder, name)
    tensors = load_file(path)
    how(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})
    return unsigned(folder)


def refused_by_both(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        mxrot.load(folder, "cpu")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 3000
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def set_value(name: str, place: int, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[place : place + 1].fill_(value)


NORM = "model.layers.0.input_layernorm.weight"
DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "a scale gone": (DOWN + ".weight_scale", lambda t: t.pop(DOWN + ".weight_scale"), "weight_scale: is missing"),
    "codes gone": (DOWN + ".weight_packed", lambda t: t.pop(DOWN + ".weight_packed"), "weight_packed: is missing"),
    "a norm gone": (NORM, lambda t: t.pop(NORM), "input_layernorm.weight: is missing"),
    "a transform gone": (TRANSFORM, lambda t: t.pop(TRANSFORM), "layer0_qkv_input.weight: is missing"),
    "the head gone": ("lm_head.weight", lambda t: t.pop("lm_head.weight"), "lm_head.weight: is missing"),
    "one too many": (NORM, lambda t: t.update({"model.extra": torch.ones(3)}), "model.extra: .* no place"),
    "scale byte 255": (DOWN + ".weight_scale", set_value(DOWN + ".weight_scale", 3, 255), "the scale NaN"),
    "NaN in a norm": (NORM, set_value(NORM, 5, torch.nan), "hold NaN or Inf"),
    "Inf in the head": ("lm_head.weight", set_value("lm_head.weight", 5, torch.inf), "hold NaN or Inf"),
    "NaN in a transform": (TRANSFORM, set_value(TRANSFORM, 5, torch.nan), "hold NaN or Inf"),
    "a transform of zeros": (TRANSFORM, lambda t: t[TRANSFORM].zero_(), "without an inverse"),
    "a transform with a row twice": (TRANSFORM, lambda t: t[TRANSFORM][0].copy_(t[TRANSFORM][1]), "without an inverse"),
    "another shape": (NORM, lambda t: t.update({NORM: t[NORM][:32]}), r"expected shape \[64\], got \[32\]"),
    "another type": (NORM, lambda t: t.update({NORM: t[NORM].to(torch.int32)}), "expected type F16 or"),
    "codes of another type": (
        DOWN + ".weight_packed",
        lambda t: t.update({DOWN + ".weight_packed": t[DOWN + ".weight_packed"].to(torch.int16)}),
        "expected type U8, got I16",
    ),
}


@pytest.mark.case("G1")
@pytest.mark.parametrize(("name", "how", "message"), DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_are_not_those_of_the_config(
    folder: Path, name: str, how: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    refused_by_both(change(folder, name, how), message)


def edit_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return unsigned(folder)


@pytest.mark.case("G1")
def test_fewer_blocks_than_there_are(folder: Path) -> None:
    refused_by_both(edit_config(folder, num_hidden_layers=1), "num_hidden_layers is 1")


@pytest.mark.case("G1")
@pytest.mark.parametrize("old", ["[64,64]", "[96,64]", '"U8"', '"BF16"', "weight_scale", "mlp", "[64]"])
def test_a_changed_header(folder: Path, old: str) -> None:
    path = shard_with(folder, DOWN + ".weight_scale")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].decode()
    start = header.find(old)
    if start < 0:
        old = '"F16"' if '"F16"' in header else '"F32"'
        start = header.find(old)
    place = start + len(old) // 2
    flipped = header[:place] + chr(ord(header[place]) ^ 1) + header[place + 1 :]
    path.write_bytes(data[:8] + flipped.encode() + data[8 + length :])
    if (folder / "run.json").exists():
        run = json.loads((folder / "run.json").read_text())
        run["files"][path.name]["sha256"] = sha256(path.read_bytes()).hexdigest()
        (folder / "run.json").write_text(json.dumps(run))
    refused_by_both(folder, ".")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


COMMANDS = {
    "eval": ("eval",),
    "generate": ("generate", "x"),
    "inspect": ("inspect",),
    "export": ("export",),
    "report": ("report",),
}


@pytest.mark.case("G2")
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file", [SHARD, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("asked", [(), ("--verify",)], ids=["by default", "--verify"])
def test_every_command_finds_a_flipped_bit(written: Path, name: str, file: str, asked: tuple[str, ...]) -> None:
    first, *rest = COMMANDS[name]
    if file == SHARD:
        flip(written / file, -40)
    else:
        path = written / file
        path.write_text(path.read_text() + "\n")
    assert f"{file}: its SHA-256 is not the one in run.json" in refused(first, written, *rest, *asked)


@pytest.mark.case("G2")
def test_a_flipped_bit_through_load_and_from_pretrained(written: Path) -> None:
    before = logits(mxrot.load(written, "cpu"))
    flip(written / SHARD, -40)
    refused_by_both(written, "the file was altered")
    with pytest.raises(CheckpointError, match="the file was altered"):
        mxrot.load(written, verify=True)
    assert not torch.equal(logits(mxrot.load(written, "cpu", verify=False)), before)


@pytest.mark.case("G2")
def test_nothing_to_verify_is_said(root: Path) -> None:
    assert "holds no hashes" in refused("generate", root / "saved", "x", "--verify")
    assert "without hashes to verify" in refused("generate", root / "tiny", "x", "--verify")


@pytest.mark.case("G2")
def test_files_that_people_read_are_hashed_when_asked(written: Path) -> None:
    (written / "README.md").write_text("my own words")
    mxrot.load(written, "cpu")
    with pytest.raises(CheckpointError, match=r"README\.md: its SHA-256"):
        mxrot.load(written, "cpu", verify=True)


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
STRANGE: dict[str, tuple[str, str | bytes]] = {
    "deep config": ("config.json", DEEP),
    "deep index": ("model.safetensors.index.json", DEEP),
    "deep run": ("run.json", DEEP),
    "deep recipe": ("recipe.toml", "a = " + "[" * 100_000 + "]" * 100_000),
    "deep generation config": ("generation_config.json", DEEP),
    "generation config of null": ("generation_config.json", "null"),
    "an empty config": ("config.json", ""),
    "a config with a mark": ("config.json", b"\xef\xbb\xbf{}"),
    "a config in Latin-1": ("config.json", '{"_name": "Jürgen"}'.encode("latin-1")),
    "a key twice": ("config.json", '{"a": 1, "a": 2}'),
    "a recipe of 5000 digits": ("recipe.toml", "a = " + "9" * 5000),
    "an empty recipe": ("recipe.toml", ""),
    "a run of 400 digits": ("run.json", '{"seed": ' + "9" * 400 + "}"),
}


@pytest.mark.case("G3")
@pytest.mark.parametrize(("name", "content"), STRANGE.values(), ids=STRANGE)
def test_strange_texts(written: Path, name: str, content: str | bytes) -> None:
    (written / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as raised:
        mxrot.load(written, "cpu", verify=False)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 3000
    assert len(refused("generate", written, "x")) < 3000


@pytest.mark.case("G3")
@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": [5]},
        {"architectures": 5},
        {"architectures": ["x" * 5000]},
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**18},
        {"num_hidden_layers": "2"},
        {"hidden_size": 10**30},
        {"rms_norm_eps": "x"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_strange_configs(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError) as raised:
        mxrot.load(folder, "cpu")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 3000


@pytest.mark.case("G3")
@pytest.mark.parametrize("strange", ["dimensions", "digits", "name"])
def test_strange_headers(folder: Path, strange: str) -> None:
    path = shard_with(folder, NORM)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    if strange == "name":
        table["x" * 5000] = table.pop(NORM)
    else:
        table[NORM]["shape"] += [1] * 70 if strange == "dimensions" else [10**399]
    header = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    with pytest.raises(CheckpointError) as raised:
        mxrot.load(folder, "cpu", verify=False)
    assert len(str(raised.value)) < 3000
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.case("G5")
@pytest.mark.parametrize("name", [SHARD, "model.safetensors.index.json", "config.json", "recipe.toml", "run.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_only_regular_files_are_opened(written: Path, name: str, kind: str) -> None:
    path = written / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        mxrot.load(written, "cpu")
    refused("generate", written, "x")


@pytest.mark.case("G5")
def test_a_fifo_as_a_shard_of_a_model(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "tiny", tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    for words in (("quantize", folder, "-r", "rtn", "-o", tmp_path / "out"), ("generate", folder, "x")):
        assert "model.safetensors" in refused(*words)


@pytest.mark.case("G13")
def test_a_name_that_is_not_ascii_in_any_locale(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "tiny", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"author": "Jürgen"}
    (folder / "config.json").write_bytes(json.dumps(config, ensure_ascii=False).encode())
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["quantize", str(folder), "-r", "rtn", "-o", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "mxrot.cli", *words], env=environment, capture_output=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert json.loads((tmp_path / "out/config.json").read_bytes())["author"] == "Jürgen"
    assert command("export", tmp_path / "out").exit_code == 0
