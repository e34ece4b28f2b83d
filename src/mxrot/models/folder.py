"""A model folder: which of its files hold the weights, and what it is where none do.

The order is that of transformers: the file that config.json names under `transformers_weights`, `model.safetensors`,
`model.safetensors.index.json` with its shards. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from mxrot.documents import read_json
from mxrot.errors import DamagedError, FamilyError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
RESAVE = "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
"""How to write a model again in safetensors, with the names of transformers."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MERGE = "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW)"


def weight_map(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The files that hold the weights, by their names in the folder; and what its index says of each tensor, if it has
    one that counts.

    FamilyError if there are none, if an adapter lies beside them, or if the index names a file that is not there.
    """
    check_folder(folder)
    if (folder / ADAPTER).is_file():
        raise FamilyError(f"{folder}: {_adapter(folder)}")
    chosen = _named_in_config(folder)
    if chosen is not None and not _is_there(folder / chosen):
        raise FamilyError(f"{folder / chosen}: is named in config.json (transformers_weights) and missing")
    if chosen is None:
        chosen = next((name for name in (SINGLE, INDEX) if _is_there(folder / name)), None)
    if chosen is None:
        raise FamilyError(f"{folder}: no {SINGLE} and no {INDEX}{_what_else(folder)}")
    if not chosen.endswith(".json"):
        return [chosen], {}
    index = read_index(folder / chosen)
    for file in sorted(set(index.values())):
        if not (folder / file).exists():
            raise FamilyError(f"{folder / file}: is named in {chosen} and missing; is the download complete?")
    return sorted(set(index.values())), index


def _is_there(path: Path) -> bool:
    """Is there anything of that name? Whether it is a file is told by who opens it."""
    return path.exists() or path.is_symlink()


def has_no_weights(folder: Path) -> bool:
    """Is there a config and nothing else, as where a model is only planned? Not so for weights that cannot be read."""
    names = sorted(path.name for path in folder.iterdir())
    return not {SINGLE, INDEX, ADAPTER} & set(names) and not what_else(names, folder)


def other_shards(folder: Path, files: list[str]) -> list[str]:
    """The shards of an index that lies beside `files`, where they are all there and others: a second set of weights."""
    if INDEX in files or not (folder / INDEX).is_file():
        return []
    shards = sorted(set(read_index(folder / INDEX).values()))
    return shards if shards != files and all((folder / name).is_file() for name in shards) else []


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, from an index; FamilyError if it is none, or leads out of its folder."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FamilyError(f"{path}: not a safetensors index (it has no weight_map)")
    index = {name: str(file) for name, file in table.items()}
    for file in set(index.values()):
        pure = PurePosixPath(file)
        if pure.is_absolute() or PureWindowsPath(file).drive or ".." in pure.parts or not file.endswith(".safetensors"):
            raise FamilyError(f"{path}: names {file[:200]!r}; expected a safetensors file in its folder")
    return index


def check_folder(folder: Path) -> None:
    """FamilyError, with what to do, unless it is a folder."""
    if folder.is_file():
        raise FamilyError(f"{folder}: is a file; {_about_file(folder)}")
    if not folder.is_dir():
        raise FamilyError(f"{folder}: no such model folder")


def no_config(place: Path) -> str:
    """What to say of a folder, or a path, where config.json is missing."""
    if place.suffix and not place.is_dir():
        return f"{place}: no such file"
    return f"{place}: no config.json; expected a model folder in the Hugging Face layout{_what_else(place)}"


def _named_in_config(folder: Path) -> str | None:
    try:
        named = read_json(folder / "config.json").get("transformers_weights")
    except DamagedError:
        return None  # who needs it says so
    if named is None:
        return None
    if not isinstance(named, str) or Path(named).name != named or not named.endswith((".safetensors", ".index.json")):
        raise FamilyError(f"{folder}: config.json: transformers_weights is {named!r}; expected a safetensors file")
    return named


def what_else(names: Sequence[str], folder: Path | None = None) -> str:
    """What there is in the place of weights, or of a config, and what to do: the end of a sentence; may be empty.

    `names` are those of the files; `folder` is where they are, if they are on this machine.
    """
    if ADAPTER in names or any(name.startswith("adapter_model.") for name in names):
        return f"; {_adapter(folder)}"
    if "model_index.json" in names:
        return "; model_index.json makes it a diffusers pipeline, which is no language model"
    found = {name.rpartition(".")[2].lower(): name for name in reversed(names) if "." in name}
    if "gguf" in found:
        return (
            f"; {found['gguf']} is for llama.cpp and quantized already: give the original model in safetensors, "
            "which its card names"
        )
    if any(name.startswith("consolidated") and name.endswith(".safetensors") for name in names):
        return (
            "; consolidated files are in Mistral's own layout: give a folder or hub id that holds model.safetensors, "
            "or convert it (transformers/models/mistral/convert_mistral_weights_to_hf.py)"
        )
    tensors = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(tensors) == 1:
        return f"; {tensors[0]} is not a name that transformers reads: if it holds the whole model, call it {SINGLE}"
    if tensors:
        return f"; {len(tensors)} safetensors files, such as {tensors[0]}, lack their {INDEX}: download that, too"
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        return (
            f"; {pickled[0]} would have to be unpickled, which mxrot never does: where you trust it, convert it with "
            f"transformers, {RESAVE}"
        )
    for ending, program in (("onnx", "ONNX"), ("msgpack", "Flax"), ("h5", "TensorFlow")):
        if ending in found:
            return f"; {found[ending]} is for {program}: give the model in safetensors"
    return ""


def _what_else(folder: Path) -> str:
    """As `what_else` of a folder, or a folder in it that may be meant."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return ""
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    inner += sorted(path.parent for path in folder.glob("snapshots/*/config.json"))
    if inner:
        meant = f"; did you mean {inner[0]}?"
    elif folder.parent.name == "snapshots":
        meant = "; the cache of the hub holds only a part of this model: get the rest with `hf download`"
    else:
        meant = "; it is empty" if not names else ""
    return what_else(names, folder) or meant


def _adapter(folder: Path | None) -> str:
    try:
        base = None if folder is None else read_json(folder / ADAPTER).get("base_model_name_or_path")
    except DamagedError:
        base = None  # it is refused all the same
    of = f" for {base}" if isinstance(base, str) else ""
    return f"{ADAPTER} makes it an adapter (LoRA){of}, not a whole model: merge it first, with {_MERGE}"


def _about_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return "GGUF files are for llama.cpp and quantized already: give the folder of the original in safetensors"
    if path.suffix in (".safetensors", ".json"):
        return f"give its folder: {path.parent}"
    return "expected a model folder, a hub id, or `demo`"
