"""Models of random weights for benchmarks/serving.py --random: speed does not depend on what weights are.

    python benchmarks/serving_random.py FOLDER [--blocks 32 --hidden 4096 ...]

Writes FOLDER/bf16 (a config alone: vLLM draws the weights), FOLDER/stock (MXFP4, one transform a site, in the words of
stock vLLM) and FOLDER/plugin (one transform a block, in mxrot's form), of the shape of Llama-3-8B unless told, with a
vocabulary of 32,000. The last two share the files with codes and scales.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mxrot.bench import llama_config
from mxrot.checkpoint.config import compressed_tensors_config, native_config
from mxrot.checkpoint.contents import install_linears
from mxrot.layers import build_apart
from mxrot.layers.transform import is_of_transform
from mxrot.models import find_family
from mxrot.recipe import load_recipe
from mxrot.scheme import Scheme
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.stages import BlockDiagonal

FOLDERS = {"bf16": "bf16", "stock W4A16": "stock", "plugin W4A4": "plugin"}
"""Of each way."""
_RECIPES = {"stock": "mxrot-vllm", "plugin": "mxrot"}
_INDEX = "model.safetensors.index.json"


def write_random(folder: Path, config: Any, device: torch.device) -> None:
    """The three folders."""
    table = config.to_diff_dict() | {"dtype": "bfloat16"}
    _write_json(folder / "bf16" / "config.json", table)
    first: Path | None = None
    for name, recipe in _RECIPES.items():
        family, skeleton = find_family(config, name), build_apart(config)
        scheme = Scheme.of(load_recipe(recipe), family, skeleton)
        words = native_config if name == "plugin" else compressed_tensors_config
        _write_json(
            folder / name / "config.json", table | {"quantization_config": words(scheme, family, torch.bfloat16)}
        )
        install_linears(skeleton, family, scheme)
        _write_tensors(folder / name, skeleton.state_dict(), family.blocks, first, device)
        first = folder / name


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _write_tensors(
    folder: Path, empty: dict[str, Tensor], blocks: str, first: Path | None, device: torch.device
) -> None:
    """Values for tensors without any; all but transforms are links to the files in `first`, if it is there."""
    listed: dict[str, str] = {}
    generator = torch.Generator(device).manual_seed(0)
    for file, names in _files_of(empty, blocks):
        if first is not None and file != "transforms.safetensors":
            os.link(first / file, folder / file)
        else:
            values = {name: _drawn(name, empty[name], generator) for name in names}
            save_file(values, folder / file, {"format": "pt"})
        listed |= dict.fromkeys(names, file)
    _write_json(folder / _INDEX, {"metadata": {}, "weight_map": listed})


def _files_of(names: dict[str, Tensor], blocks: str) -> Iterator[tuple[str, list[str]]]:
    """File by file, which tensors it holds: a file for each decoder block, one for the rest, one for all transforms."""
    files: dict[str, list[str]] = {}
    for name in names:
        number = name.removeprefix(f"{blocks}.").partition(".")[0]
        file = f"block-{number}" if name.startswith(f"{blocks}.") else "rest"
        file = "transforms" if is_of_transform(name) else file
        files.setdefault(f"{file}.safetensors", []).append(name)
    yield from files.items()


def _drawn(name: str, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Values of the same shape and type, on the CPU."""
    if is_of_transform(name):
        matrices = random_orthogonal(empty.shape[:-2].numel(), empty.shape[-1], torch.Generator().manual_seed(0))
        return BlockDiagonal(matrices).to_stored().reshape(empty.shape).to(empty.dtype).contiguous()
    drawn = torch.ones(empty.shape, dtype=empty.dtype, device=generator.device)
    if name.endswith("weight_packed"):
        drawn.random_(0, 256, generator=generator)
    elif name.endswith("weight_scale"):
        # Codes are 3 in the mean square, so that 2^-e is about 1/sqrt(inputs).
        drawn.fill_(127 - round(torch.tensor(3.0 * (32 * empty.shape[-1]) ** 0.5).log2().item()))
    elif empty.dim() > 1:
        drawn.normal_(generator=generator).mul_(empty.shape[-1] ** -0.5)
    return drawn.cpu()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    options = parser.parse_args(arguments)
    shape = options.hidden, options.ffn, options.blocks, options.heads, options.kv_heads, options.vocabulary
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_random(options.folder, llama_config(*shape), device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
