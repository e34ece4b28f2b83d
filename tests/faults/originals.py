"""Small checkpoints to damage: recipes, families, and who has written them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tests.cases.commands import logits
from tests.tiny_model import random_windows, tiny_config, write_tiny_mixture, write_tiny_model, write_tokenizer
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

import mxrot
from mxrot.checkpoint import quantize_to_folder
from mxrot.recipe import load_recipe


@dataclass(frozen=True)
class Original:
    """A checkpoint, and what it computes."""

    name: str
    folder: Path
    logits: Tensor
    has_hashes: bool


def write_originals(root: Path, every: bool = True) -> list[Original]:
    """Checkpoints under `root`; without `every` one that mxrot has written, and one that save_pretrained has."""
    llama = write_tiny_model(root / "llama")
    made = [
        _written(root, "mxrot", llama, "mxrot", {}),
        _saved_again(root, "saved", llama, "hadamard", "1GB"),
    ]
    if every:
        made += [
            _written(root, "rtn", llama, "rtn", {"ignore": ["k_proj", "*.1.mlp.*"]}),
            _written(root, "phi3", _phi3(root / "tiny-phi3"), "hadamard", {}),
            _written(root, "mixtral", write_tiny_mixture(root / "tiny-mixtral", "mixtral"), "hadamard", {}),
            _saved_again(root, "saved in shards", llama, "rtn", "30KB"),
        ]
    return made


def _written(root: Path, name: str, source: Path, recipe: str, changes: dict[str, object]) -> Original:
    chosen = load_recipe(recipe).changed(changes)
    windows = None if chosen.is_data_free else random_windows(2, 24)
    quantize_to_folder(source, chosen, root / name, base_name="tiny", windows=windows)
    return Original(name, root / name, logits(mxrot.load(root / name, "cpu")), True)


def _saved_again(root: Path, name: str, source: Path, recipe: str, shards: str) -> Original:
    quantize_to_folder(source, load_recipe(recipe), root / f"before {name}", base_name="tiny")
    model = mxrot.load(root / f"before {name}", "cpu")
    model.save_pretrained(root / name, max_shard_size=shards)
    write_tokenizer(root / name)
    return Original(name, root / name, logits(model), False)


def _phi3(folder: Path) -> Path:
    shared = tiny_config(pad_token_id=0).to_diff_dict()
    settings = {key: value for key, value in shared.items() if key not in ("model_type", "architectures", "head_dim")}
    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(**settings)).to(torch.float16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
