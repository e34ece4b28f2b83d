"""Damage to a checkpoint, drawn from a seed: to headers, data, names, indexes, configs, records and side files.

Each kind says what it may come to when nothing is hashed: `keeps` computes the same or is an error, `changes` alters a
value that nothing but a hash can know of.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Damage = Callable[[Path, random.Random], object]
INDEX = "model.safetensors.index.json"
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2.5, 1 << 70, "", "x", "mxfp6_e2m3", "even", "floor", [], {}, [5], {"a": 1}),
    *(["re:.*"], [None], "x" * 5000, [[[]]], 1e300, "\ud800", "/etc/passwd", "../x", "\x1b[2J", 10**30),
)
DEEP = '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}"
RAW: tuple[bytes, ...] = (
    *(b"", b"{", b"null", b"[]", b"5", b'"x"', b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"{}", b'{"a": 1, "a": 2}'),
    *(DEEP.encode(), b'{"a": ' + b"9" * 400 + b"}", b'{"a": NaN}', b'{"a": 1e999}', b"\x00" * 64, b"a = ", b"a = {"),
)


@dataclass(frozen=True)
class Kind:
    """A way to damage a checkpoint."""

    name: str
    damage: Damage
    changes: bool = False
    """May it alter what is computed, unseen by anything but a hash?"""
    share: int = 1
    """How often it is drawn, beside the others."""
    by_transformers: bool = True
    """Does transformers come as far as mxrot's checks, or stop at the damage itself with an error of its own?"""


def shard(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(folder.glob("*.safetensors")))


def flip(path: Path, chance: random.Random, start: int, end: int) -> None:
    data = bytearray(path.read_bytes())
    place = chance.randrange(8 * start, 8 * end)
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def header_length(path: Path) -> int:
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def flip_header(folder: Path, chance: random.Random) -> None:
    path = shard(folder, chance)
    flip(path, chance, 0, header_length(path))


def flip_data(folder: Path, chance: random.Random) -> None:
    path = shard(folder, chance)
    flip(path, chance, header_length(path), path.stat().st_size)


def edit_header(folder: Path, chance: random.Random) -> None:
    """A claim of the header that no writer makes, with the data as it was."""
    path = shard(folder, chance)
    data, length = path.read_bytes(), header_length(path)
    table = json.loads(data[8:length])
    name = chance.choice([name for name in table if name != "__metadata__"])
    entry = table[name]
    start, end = entry["data_offsets"]
    edits: list[Callable[[], object]] = [
        lambda: entry.update(dtype=chance.choice(("F64", "I8", "BOOL", "F8_E4M3", "F4", "U16", "XX", 5, None))),
        lambda: entry.update(shape=entry["shape"] + [1] * chance.choice((1, 70))),
        lambda: entry.update(shape=[-size for size in entry["shape"]]),
        lambda: entry.update(shape=list(reversed(entry["shape"])) if len(set(entry["shape"])) > 1 else [10**399]),
        lambda: entry.update(shape=[1 << 62, 1 << 62]),
        lambda: entry.update(data_offsets=[start + 1, end + 1]),
        lambda: entry.update(data_offsets=[start, 1 << 64]),
        lambda: entry.update(data_offsets=chance.choice(([], [0], "x", None, [start], [end, start], [start, "x"]))),
        lambda: table.update({name: chance.choice(STRANGE)}),
        lambda: table.update({"x" * 5000: table.pop(name)}),
        lambda: table.update({f"{name}\n": table.pop(name)}),
        lambda: table.update(__metadata__=chance.choice(STRANGE[3:])),
        lambda: entry.pop(chance.choice(sorted(entry))),
        lambda: table.pop(name),
        lambda: table.update({f"{name}.copy": entry}),
    ]
    chance.choice(edits)()
    header = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[length:])


def write_header(folder: Path, chance: random.Random) -> None:
    path = shard(folder, chance)
    header = chance.choice(RAW)
    path.write_bytes(struct.pack("<Q", len(header)) + header + path.read_bytes()[header_length(path) :])


def write_length(folder: Path, chance: random.Random) -> None:
    path = shard(folder, chance)
    length = chance.choice((0, 1, 2**63, 2**64 - 1, 10**8, header_length(path) - 9, chance.getrandbits(64)))
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def cut(folder: Path, chance: random.Random) -> None:
    path = shard(folder, chance)
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def append(folder: Path, chance: random.Random) -> None:
    path = shard(folder, chance)
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.choice((1, 8, 4096))))


def change_tensors(change: Callable[[dict[str, Tensor], random.Random], object]) -> Damage:
    """Change the tensors of a shard and write it whole, index and run.json made to fit."""

    def damage(folder: Path, chance: random.Random) -> None:
        path = shard(folder, chance)
        tensors = load_file(path)
        change(tensors, chance)
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"format": "pt"})
        if (folder / INDEX).exists():
            index = json.loads((folder / INDEX).read_text())
            kept = {name: file for name, file in index["weight_map"].items() if file != path.name}
            (folder / INDEX).write_text(json.dumps(index | {"weight_map": kept | dict.fromkeys(tensors, path.name)}))
        if (folder / "run.json").exists():
            run = json.loads((folder / "run.json").read_text())
            run["files"][path.name]["bytes"] = path.stat().st_size
            (folder / "run.json").write_text(json.dumps(run))

    return damage


def drop_tensor(tensors: dict[str, Tensor], chance: random.Random) -> None:
    for name in chance.sample(sorted(tensors), chance.randint(1, min(3, len(tensors)))):
        del tensors[name]


def add_tensor(tensors: dict[str, Tensor], chance: random.Random) -> None:
    name = chance.choice(sorted(tensors))
    tensors[chance.choice((f"{name}.extra", "model.extra", "model.layers.9.x", "lm_head.bias", f"model.{name}"))] = (
        torch.zeros(3)
    )


def rename_tensor(tensors: dict[str, Tensor], chance: random.Random) -> None:
    name = chance.choice(sorted(tensors))
    tensors[chance.choice((f"_orig_mod.{name}", name.upper(), name[:-1], name.replace(".", "/")))] = tensors.pop(name)


def reshape_tensor(tensors: dict[str, Tensor], chance: random.Random) -> None:
    name = chance.choice(sorted(tensors))
    value = tensors[name]
    tensors[name] = chance.choice((value[:-1], value[None], torch.cat([value, value]), value.flatten()[:0]))


def retype_tensor(tensors: dict[str, Tensor], chance: random.Random) -> None:
    name = chance.choice(sorted(tensors))
    value = tensors[name]
    dtype = torch.int8 if value.dtype == torch.uint8 else chance.choice((torch.int32, torch.uint8, torch.complex64))
    tensors[name] = value.to(torch.float32).nan_to_num().to(dtype)


def break_value(tensors: dict[str, Tensor], chance: random.Random) -> None:
    """A value that no quantization writes."""
    scales = [name for name in sorted(tensors) if name.endswith("weight_scale")]
    transforms = [name for name in sorted(tensors) if name.endswith("_input.weight")]
    floats = [name for name in sorted(tensors) if tensors[name].is_floating_point()]
    kind = chance.choice([names for names in (scales, transforms, floats) if names])
    value = tensors[chance.choice(kind)]
    place = chance.randrange(value.numel())
    if kind is scales:
        value.view(-1)[place] = 255
    elif kind is transforms and chance.random() < 0.7:
        matrix = value.view(-1, *value.shape[-2:])[chance.randrange(value.numel() // 1024)]
        matrix[chance.randrange(32)] = chance.choice((0.0, matrix[0].clone() * 0, float("inf")))
    else:
        value.view(-1)[place] = chance.choice((float("nan"), float("inf"), float("-inf")))


def swap_values(tensors: dict[str, Tensor], chance: random.Random) -> None:
    """Values that could have been written."""
    name = chance.choice(sorted(tensors))
    tensors[name] = tensors[name].flip(0) if tensors[name].dim() else tensors[name] + 1


def replace_file(names: tuple[str, ...], pattern: str = "") -> Damage:
    """Another thing in the place of a file."""

    def damage(folder: Path, chance: random.Random) -> None:
        there = [path for path in (folder / name for name in names) if path.exists()] + sorted(
            folder.glob(pattern or "\0")
        )
        if not there:
            return
        path = chance.choice(there)
        path.unlink()
        thing = chance.choice(("nothing", "fifo", "folder", "dangling", "loop", "device", "raw"))
        if thing == "fifo":
            os.mkfifo(path)
        elif thing == "folder":
            path.mkdir()
        elif thing in ("dangling", "loop", "device"):
            path.symlink_to({"dangling": "nowhere", "loop": path.name, "device": "/dev/zero"}[thing])
        elif thing == "raw":
            path.write_bytes(chance.choice(RAW))

    return damage


def flip_text(*names: str) -> Damage:
    def damage(folder: Path, chance: random.Random) -> None:
        there = [folder / name for name in names if (folder / name).exists()]
        if there:
            path = chance.choice(there)
            flip(path, chance, 0, path.stat().st_size)

    return damage


def places(table: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value but itself."""
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


def edit_json(name: str, inside: tuple[str, ...] = (), keys: tuple[str, ...] = ()) -> Damage:
    """Take something out of a JSON file, or put something strange in its place."""

    def damage(folder: Path, chance: random.Random) -> None:
        if not (folder / name).exists():
            return
        table = json.loads((folder / name).read_text())
        part = table
        for key in inside:
            part = part[key]
        *way, last = chance.choice([(key,) for key in keys] or places(part))
        for key in way:
            part = part[key]
        action = chance.random()
        if action < 0.3:
            part.pop(last) if not isinstance(part, dict) else part.pop(last, None)
        elif action < 0.4 and isinstance(part, dict):
            part[f"{last}x"] = part.pop(last, None)
        else:
            part[last] = chance.choice(STRANGE)
        (folder / name).write_text(json.dumps(table))

    return damage


def edit_depth(folder: Path, chance: random.Random) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = chance.choice((0, 1, 3, 10**6, 10**12, 10**18, -1, "2", 2.5, True, None, [2]))
    (folder / "config.json").write_text(json.dumps(config))


def edit_recipe(folder: Path, chance: random.Random) -> None:
    """Another recipe than the one that was installed, in valid TOML."""
    path = folder / "recipe.toml"
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    place = chance.choice([number for number, line in enumerate(lines) if " = " in line])
    key = lines[place].partition(" = ")[0]
    value = chance.choice(
        ('"floor"', '"even"', '"site"', '"block"', '"fast"', '["q_proj"]', "1", '"nvfp4"', "true", "{")
    )
    lines[place] = f"{key} = {value}"
    path.write_text("\n".join(lines))


def edit_index(folder: Path, chance: random.Random) -> None:
    if not (folder / INDEX).exists():
        return
    index = json.loads((folder / INDEX).read_text())
    table = index["weight_map"]
    name, files = chance.choice(sorted(table)), sorted(set(table.values()))
    edits: list[Callable[[], object]] = [
        lambda: table.pop(name),
        lambda: table.update({name: chance.choice([file for file in files if file != table[name]] or ["x"])}),
        lambda: table.update({name: chance.choice(STRANGE)}),
        lambda: table.update({f"{name}.extra": table[name]}),
        lambda: table.update({name: f"../{folder.name}/{table[name]}"}),
        lambda: table.update({name: f"./{table[name]}"}),
        lambda: index.update(weight_map=chance.choice(STRANGE)),
        lambda: index.pop("weight_map"),
        lambda: index.update(metadata=chance.choice(STRANGE)),
    ]
    chance.choice(edits)()
    (folder / INDEX).write_text(json.dumps(index))


QUANTIZATION = ("quantization_config",)
KINDS = (
    Kind("a bit of a header", flip_header, share=8),
    Kind("a claim of a header", edit_header, share=6),
    Kind("a header of something else", write_header),
    Kind("the length of a header", write_length, share=2),
    Kind("a shard cut short", cut, share=2),
    Kind("bytes behind a shard", append),
    Kind("a tensor gone", change_tensors(drop_tensor), share=4),
    Kind("a tensor too many", change_tensors(add_tensor), share=2),
    Kind("a tensor by another name", change_tensors(rename_tensor), share=2),
    Kind("a tensor of another shape", change_tensors(reshape_tensor), share=2),
    Kind("a tensor of another type", change_tensors(retype_tensor), share=2),
    Kind("a value that is none", change_tensors(break_value), share=4),
    Kind("values of another model", change_tensors(swap_values), changes=True, share=2),
    Kind("a bit of the data", flip_data, changes=True, share=4),
    Kind("no file where a shard was", replace_file((), "*.safetensors"), share=2, by_transformers=False),
    Kind("no file where a text was", replace_file(("config.json", INDEX, "recipe.toml", "run.json")), share=2,
         by_transformers=False),
    Kind("the index", edit_index, share=3, by_transformers=False),
    Kind("the quantization_config", edit_json("config.json", QUANTIZATION), share=8),
    Kind("parts of the quantization_config", edit_json("config.json", QUANTIZATION, (
        "format", "ignore", "transform_config", "config_groups", "mxrot", "quant_method")), share=3,
        by_transformers=False),
    Kind("the config", edit_json("config.json"), changes=True, share=4, by_transformers=False),
    Kind("architectures", edit_json("config.json", (), ("architectures", "quantization_config")),
         by_transformers=False),
    Kind("the number of blocks", edit_depth, share=2, by_transformers=False),
    Kind("a bit of the config", flip_text("config.json"), changes=True, share=2, by_transformers=False),
    Kind("the recipe", edit_recipe, share=4),
    Kind("a bit of the recipe", flip_text("recipe.toml")),
    Kind("the record", edit_json("run.json"), share=2),
    Kind("a bit of the record or the index", flip_text("run.json", INDEX), share=2, by_transformers=False),
    Kind("the generation config", edit_json("generation_config.json"), by_transformers=False),
    Kind("a bit of the generation config", flip_text("generation_config.json"), by_transformers=False),
    Kind("a file of the tokenizer", replace_file(("tokenizer.json", "tokenizer_config.json"))),
)  # fmt: skip


def draw(seed: int) -> Kind:
    """The kind of damage of a seed."""
    return random.Random(seed).choices(KINDS, [kind.share for kind in KINDS])[0]
