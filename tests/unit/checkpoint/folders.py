"""Small checkpoints, and how folders and models are compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import random_windows
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.checkpoint import quantize_to_folder
from mxrot.recipe import Recipe, load_recipe

WINDOWS = random_windows(6, 24)
TOKENS = random_windows(2, 16, seed=1)


def recipe(name: str, **changes: Any) -> Recipe:
    """A built-in recipe with a short search for outliers; double underscores stand for dots."""
    found = load_recipe(name)
    shorter = {"transform.steps": 16} if found.transform.name in ("outlier", "dual") else {}
    return found.changed(shorter | {key.replace("__", "."): value for key, value in changes.items()})


def windows_for(chosen: Recipe) -> Tensor | None:
    return None if chosen.is_data_free else WINDOWS


def write(source: Path, output: Path, chosen: Recipe, **options: Any) -> dict[str, Any]:
    """Quantize `source` into `output`; its run.json."""
    settings = {"base_name": "tiny", "windows": windows_for(chosen)} | options
    return quantize_to_folder(source, chosen, output, **settings)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file under a folder, by its relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def without_run(found: dict[str, str]) -> dict[str, str]:
    """All but run.json, which holds times."""
    return {name: digest for name, digest in found.items() if name != "run.json"}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every shard."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def change_run(folder: Path, shard: str) -> None:
    """Let run.json give the size that a shard has now."""
    run = json.loads((folder / "run.json").read_text())
    run["files"][shard]["bytes"] = (folder / shard).stat().st_size
    (folder / "run.json").write_text(json.dumps(run))


def change_shard(folder: Path, number: int, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a shard so that index and sizes agree with what it holds then."""
    path = sorted(folder.glob("*.safetensors"))[number]
    tensors = load_file(path)
    before = set(tensors)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    for name in before - set(tensors):
        del index["weight_map"][name]
    index["weight_map"] |= dict.fromkeys(set(tensors) - before, path.name)
    index_path.write_text(json.dumps(index))
    change_run(folder, path.name)
