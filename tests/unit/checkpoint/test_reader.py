"""A damaged checkpoint: one clear CheckpointError, nothing unpickled, nothing changed on disk."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.unit.checkpoint.folders import change_run, change_shard, digests, recipe, write
from torch import Tensor

from mxrot.checkpoint import is_checkpoint, load
from mxrot.errors import CheckpointError

SHARD = "model-00002-of-00003.safetensors"
DOWN = "model.layers.0.mlp.down_proj"
QKV_TRANSFORM = "model.layers.0.self_attn.q_proj.layer0_qkv_input.weight"
Damage = Callable[[Path], object]


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint with one matrix a site, and one with a matrix a block."""
    folders = {}
    for sharing in ("site", "block"):
        folders[sharing] = tmp_path_factory.mktemp("written") / sharing
        write(source, folders[sharing], recipe("duquant++", transform__sharing=sharing))
    return folders


@pytest.fixture
def checkpoint(written: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written["site"], tmp_path / "ckpt"))


def assert_refused(folder: Path, message: str, verify: bool | None = False) -> None:
    before = digests(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        load(folder, verify=verify)
    assert "\n" not in str(raised.value)
    assert digests(folder) == before


def edit_json(name: str, change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        table = json.loads((folder / name).read_text())
        change(table)
        (folder / name).write_text(json.dumps(table))

    return damage


def edit_tensors(number: int, change: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda folder: change_shard(folder, number, change)


def replace(name: str, change: Callable[[Tensor], Tensor], number: int = 1) -> Damage:
    return edit_tensors(number, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def write_text(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def quantization(folder_config: dict) -> dict:
    return folder_config["quantization_config"]


DAMAGE: dict[str, tuple[Damage, str]] = {
    "truncated shard": (
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1]),
        rf"{SHARD}: cannot be read as safetensors \(its tensors take \d+ bytes, and it holds \d+; is it truncated\?\)",
    ),
    "missing shard": (remove(SHARD), f"{SHARD}: is named in .* and missing"),
    "missing index": (
        remove("model.safetensors.index.json"),
        "no model.safetensors and no model.safetensors.index.json",
    ),
    "missing tokenizer": (remove("tokenizer.json"), "tokenizer.json: is missing"),
    "missing tensor": (
        edit_tensors(1, lambda tensors: tensors.pop(f"{DOWN}.weight_scale")),
        rf"{DOWN}.weight_scale: is missing; config.json says that it is there, \[64, 3\]",
    ),
    "missing transform": (
        edit_tensors(1, lambda tensors: tensors.pop(QKV_TRANSFORM)),
        r"q_proj.layer0_qkv_input.weight: is missing; config.json says that it is there, \[32, 32\]",
    ),
    "missing embedding": (
        edit_tensors(0, lambda tensors: tensors.pop("model.embed_tokens.weight")),
        "model.embed_tokens.weight: is missing",
    ),
    "missing head": (
        edit_tensors(0, lambda tensors: tensors.pop("lm_head.weight")),
        r"lm_head.weight: is missing; config.json says that it is there, \[256, 64\]",
    ),
    "extra tensor in a block": (
        edit_tensors(1, lambda tensors: tensors.update({f"{DOWN}.extra": torch.zeros(2)})),
        f"{DOWN}.extra: a model of family llama and this config has no place for this tensor",
    ),
    "extra tensor outside": (
        edit_tensors(0, lambda tensors: tensors.update({"model.extra": torch.zeros(2)})),
        "model.extra: a model of family llama and this config has no place for this tensor",
    ),
    "extra block": (
        edit_tensors(0, lambda tensors: tensors.update({"model.layers.7.input_layernorm.weight": torch.ones(64)})),
        "num_hidden_layers is 2, and there are tensors of 3 decoder blocks",
    ),
    "wrong shape of codes": (
        replace(f"{DOWN}.weight_packed", lambda value: value[:, :-16]),
        rf"{DOWN}.weight_packed: expected shape \[64, 48\], got \[64, 32\]",
    ),
    "wrong shape of a norm": (
        replace("model.norm.weight", lambda value: value[:32], number=0),
        r"model.norm.weight: expected shape \[64\], got \[32\]",
    ),
    "transform of a smaller block": (
        replace(QKV_TRANSFORM, lambda value: value[:16, :16]),
        r"layer0_qkv_input.weight: expected shape \[32, 32\], got \[16, 16\]",
    ),
    "transform a block where one is shared": (
        replace(QKV_TRANSFORM, lambda value: value.expand(2, 32, 32)),
        r"layer0_qkv_input.weight: expected shape \[32, 32\], got \[2, 32, 32\]",
    ),
    "wrong dtype of codes": (
        replace(f"{DOWN}.weight_packed", lambda value: value.to(torch.int8)),
        f"{DOWN}.weight_packed: expected type U8, got I8",
    ),
    "wrong dtype of scales": (
        replace(f"{DOWN}.weight_scale", lambda value: value.to(torch.float16)),
        f"{DOWN}.weight_scale: expected type U8, got F16",
    ),
    "wrong dtype of a transform": (
        replace(QKV_TRANSFORM, lambda value: value.to(torch.float32)),
        "layer0_qkv_input.weight: expected type BF16, got F32",
    ),
    "whole numbers in a norm": (
        replace("model.layers.0.input_layernorm.weight", lambda value: value.to(torch.int32)),
        "input_layernorm.weight: expected type F16 or BF16 or F32 or F64, got I32",
    ),
    "whole numbers in the embedding": (
        replace("model.embed_tokens.weight", lambda value: value.to(torch.int32), number=0),
        "model.embed_tokens.weight: expected type F16 or BF16 or F32 or F64, got I32",
    ),
    "scale byte 255": (
        replace(f"{DOWN}.weight_scale", lambda value: value.fill_(255)),
        f"{DOWN}.weight_scale: holds the scale NaN",
    ),
    "NaN in a norm": (
        replace("model.layers.0.input_layernorm.weight", lambda value: value * torch.nan),
        "input_layernorm.weight: the weights hold NaN or Inf",
    ),
    "NaN in a transform": (replace(QKV_TRANSFORM, lambda value: value * torch.nan), "layer0_qkv_input.weight: .* NaN"),
    "missing run.json": (remove("run.json"), r"run.json: cannot be read \(No such file or directory\)"),
    "broken run.json": (write_text("run.json", '{"files": '), "run.json: not JSON"),
    "run.json without files": (write_text("run.json", "{}"), "run.json: has no list of files"),
    "run.json of another kind": (write_text("run.json", "[1]"), "run.json: expected a JSON object"),
    "run.json without sizes": (
        edit_json("run.json", lambda run: run["files"].update({SHARD: {}})),
        f"run.json: gives no size and SHA-256 of {SHARD}",
    ),
    "missing config.json": (remove("config.json"), "config.json: cannot be read"),
    "broken config.json": (write_text("config.json", "{"), "config.json: not JSON"),
    "config.json of bytes": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "not UTF-8 text"),
    "another format version": (
        edit_json("config.json", lambda config: quantization(config)["mxrot"].update(format_version=6)),
        "checkpoint format version 6; this mxrot reads versions 1 to 5",
    ),
    "no marker": (
        edit_json("config.json", lambda config: quantization(config).pop("mxrot")),
        "config.json has no 'mxrot' marker; not a checkpoint written by mxrot",
    ),
    "quantization_config of another kind": (
        edit_json("config.json", lambda config: config.update(quantization_config=["mxrot"])),
        "not a checkpoint written by mxrot",
    ),
    "config of another family": (
        edit_json("config.json", lambda config: config.update(architectures=["GPT2LMHeadModel"])),
        "GPT2LMHeadModel is of no known family",
    ),
    "config with more blocks": (
        edit_json("config.json", lambda config: config.update(num_hidden_layers=3)),
        "num_hidden_layers is 3, and there are tensors of 2 decoder blocks",
    ),
    "config with fewer blocks": (
        edit_json("config.json", lambda config: config.update(num_hidden_layers=1)),
        "num_hidden_layers is 1, and there are tensors of 2 decoder blocks",
    ),
    "config of another width": (
        edit_json("config.json", lambda config: config.update(hidden_size=128)),
        r"lm_head.weight: expected shape \[256, 128\], got \[256, 64\]",
    ),
    "config that builds no model": (
        edit_json("config.json", lambda config: config.update(hidden_act="no such thing")),
        "transformers cannot build this model",
    ),
    "broken recipe": (write_text("recipe.toml", "name = "), "recipe.toml: not TOML"),
    "recipe of bytes": (
        lambda folder: (folder / "recipe.toml").write_bytes(b"\xff\xfe\x00"),
        "recipe.toml: not UTF-8 text",
    ),
    "recipe with an unknown key": (write_text("recipe.toml", "colour = 1"), "recipe.toml: unknown key 'colour'"),
    "missing recipe": (remove("recipe.toml"), "recipe.toml: cannot be read"),
    "missing recipe that run.json does not list": (
        lambda folder: (
            remove("recipe.toml")(folder),
            edit_json("run.json", lambda r: r["files"].pop("recipe.toml"))(folder),
        ),
        "recipe.toml",
    ),
    "broken index": (write_text("model.safetensors.index.json", "[]"), "expected a JSON object"),
    "index that names another file": (
        edit_json(
            "model.safetensors.index.json", lambda x: x["weight_map"].update({f"{DOWN}.weight_scale": "no.safetensors"})
        ),
        "no.safetensors: is named in .* and missing",
    ),
    "index that names a tensor of another file": (
        edit_json(
            "model.safetensors.index.json",
            lambda x: x["weight_map"].update({f"{DOWN}.weight_scale": SHARD.replace("2-of", "3-of")}),
        ),
        f"does not list {DOWN}.weight_scale of {SHARD}; the index and the files do not belong together",
    ),
    "broken generation_config.json": (
        write_text("generation_config.json", "{"),
        "generation_config.json: not a generation config that transformers reads",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_one_clear_error(checkpoint: Path, damage: Damage, message: str) -> None:
    load(checkpoint)
    damage(checkpoint)
    assert_refused(checkpoint, message)


def test_a_blockwise_transform_of_too_many_blocks(written: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["block"], tmp_path / "ckpt"))
    replace(QKV_TRANSFORM, lambda value: value.repeat(2, 1, 1))(folder)
    assert_refused(folder, r"expected shape \[2, 32, 32\], got \[4, 32, 32\]")


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json", "README.md", "recipe.toml"])
def test_an_altered_byte_is_found_with_verify(checkpoint: Path, name: str) -> None:
    data = bytearray((checkpoint / name).read_bytes())
    if name.endswith(".safetensors"):
        data[-2] ^= 1
    else:
        data += b"\n"
    (checkpoint / name).write_bytes(data)
    load(checkpoint, verify=False)
    assert_refused(checkpoint, f"{name}: its SHA-256 is not the one in run.json; the file was altered", verify=True)
    if name == "README.md":
        load(checkpoint)
    else:
        assert_refused(checkpoint, "the file was altered; verify=False", verify=None)


def test_no_pickle_is_ever_read(checkpoint: Path, tmp_path: Path) -> None:
    """A pickle under the name of a shard, with run.json made to fit it."""
    exploded = tmp_path / "exploded"
    (checkpoint / SHARD).write_bytes(pickle.dumps(Bomb(exploded)))
    change_run(checkpoint, SHARD)
    assert_refused(checkpoint, f"{SHARD}: cannot be read as safetensors")
    assert not exploded.exists()
    pickle.loads((checkpoint / SHARD).read_bytes())
    assert exploded.exists()  # it was a live one


def test_file_names_of_run_json_do_not_lead_out_of_the_folder(checkpoint: Path) -> None:
    edit_json("run.json", lambda run: run["files"].update({"../../secret": {"bytes": 1, "sha256": ""}}))(checkpoint)
    assert_refused(checkpoint, f"{re.escape(str(checkpoint))}/secret: is missing")


def test_what_is_no_checkpoint(source: Path, tmp_path: Path) -> None:
    assert_refused(source, "not a checkpoint written by mxrot")
    assert_refused(tmp_path / "nowhere", "nowhere: no such checkpoint folder")
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "file", "file: no such checkpoint folder")


def test_is_checkpoint(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    assert is_checkpoint(checkpoint)
    assert not is_checkpoint(source)
    assert not is_checkpoint(tmp_path / "nowhere")
    DAMAGE["another format version"][0](checkpoint)
    assert is_checkpoint(checkpoint)  # so that `load` can say what is wrong with it
    for name in ("no marker", "broken config.json", "config.json of bytes", "missing config.json"):
        DAMAGE[name][0](checkpoint)
        assert is_checkpoint(checkpoint)  # by the files that nobody else writes
    (checkpoint / "run.json").unlink()
    assert not is_checkpoint(checkpoint)
