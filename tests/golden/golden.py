"""Bits that must not change unnoticed: SHA-256 of the tensors of a small data-free checkpoint.

The weights are products of whole numbers, so that they are the same on every machine. Recipe rtn has nothing but
exact steps. Recipe hadamard folds a matrix in float64, whose last bits belong to the machine; the golden test
checks that no weight lies so close to a tie that they would decide.

To write the file anew: python -m tests.golden.golden
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import write_tiny_model
from torch import Tensor

from mxrot.checkpoint import quantize_to_folder
from mxrot.recipe import load_recipe

FILE = Path(__file__).parent / "golden.json"
RECIPES = ("rtn", "hadamard")


def golden_model(folder: Path) -> Path:
    """One block with exact weights k * m / 2^20, |k| < 2^11, m of 1, 2, 4, ... 128: heavy tails, in float16."""
    write_tiny_model(folder, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(20252)
    tensors = load_file(folder / "model.safetensors")
    for name in sorted(tensors):
        shape = tensors[name].shape
        whole = torch.randint(-2047, 2048, shape, generator=generator)
        power = torch.randint(0, 8, shape, generator=generator)
        tensors[name] = (whole.double() * 2.0 ** (power - 20).double()).to(torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data).hexdigest()


def golden_checkpoint(folder: Path, recipe: str) -> dict[str, Tensor]:
    """The tensors that a checkpoint of the golden model holds."""
    source = golden_model(folder / "source")
    quantize_to_folder(source, load_recipe(recipe), folder / recipe, base_name="golden", seed=0)
    tensors: dict[str, Tensor] = {}
    for path in sorted((folder / recipe).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def golden_digests(folder: Path, recipe: str) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in sorted(golden_checkpoint(folder, recipe).items())}


if __name__ == "__main__":
    import tempfile

    table = {}
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as scratch:
            table[name] = golden_digests(Path(scratch), name)
    FILE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {FILE}")
