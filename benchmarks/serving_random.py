"""Models of random weights for benchmarks/serving.py --random: speed does not depend on what weights are.

    python benchmarks/serving_random.py FOLDER [--blocks 32 --hidden 4096 ...] [--head mxint8 ...]

Writes FOLDER/bf16 (a config alone: vLLM draws the weights), FOLDER/stock (MXFP4, one transform a site, in the words of
stock vLLM) and FOLDER/plugin (one transform a block, in mxrot's form), of the shape of Llama-3-8B unless told, with a
vocabulary of 32,000. The last two share the files with codes and scales. `--head mxint8` also writes
FOLDER/plugin-head-mxint8: FOLDER/plugin with its head quantized, as `mxrot quantize --head mxint8` would do it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxrot.bench import llama_config
from mxrot.checkpoint.config import compressed_tensors_config, native_config
from mxrot.checkpoint.contents import install_linears
from mxrot.errors import ConfigError
from mxrot.layers import build_apart
from mxrot.layers.transform import is_of_transform
from mxrot.models import Family, find_family
from mxrot.quantizing.head import rounded_head
from mxrot.recipe import Recipe, load_recipe
from mxrot.scheme import Scheme, SiteScheme
from mxrot.sections import HeadChoice
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.stages import BlockDiagonal

FOLDERS = {"bf16": "bf16", "stock W4A16": "stock", "plugin W4A4": "plugin"}
"""Of each way without a quantized head."""
_HEADED = "plugin-head-"
_HEAD, _TRANSFORMS = "head.safetensors", "transforms.safetensors"
_INDEX = "model.safetensors.index.json"


def head_folders(folder: Path) -> list[Path]:
    """The folders of models with quantized heads."""
    return sorted(folder.glob(f"{_HEADED}*"))


def _recipes(heads: Sequence[HeadChoice]) -> dict[str, Recipe]:
    """By the name of a folder."""
    plugin = load_recipe("mxrot")
    found = {"stock": load_recipe("mxrot-vllm"), "plugin": plugin}
    for head in heads:
        formats = "-".join(filter(None, (head.format, head.inputs)))
        found[f"{_HEADED}{formats}"] = replace(plugin, head=head)
    return found


def write_random(folder: Path, config: Any, device: torch.device, heads: Sequence[HeadChoice] = ()) -> None:
    """The three folders, and one for each quantized head."""
    table = config.to_diff_dict() | {"dtype": "bfloat16"}
    _write_json(folder / "bf16" / "config.json", table)
    first: Path | None = None
    for name, recipe in _recipes(heads).items():
        family, skeleton = find_family(config, name), build_apart(config)
        scheme = Scheme.of(recipe, family, skeleton)
        words = compressed_tensors_config if name == "stock" else native_config
        _write_json(
            folder / name / "config.json", table | {"quantization_config": words(scheme, family, torch.bfloat16)}
        )
        install_linears(skeleton, family, scheme)
        head = None if first is None or scheme.head is None else _rounded(scheme.head, family, first, device)
        _write_tensors(folder / name, skeleton.state_dict(), family, first, device, head)
        first = first or folder / name


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _rounded(scheme: SiteScheme, family: Family, first: Path, device: torch.device) -> dict[str, Tensor]:
    """The head in the folder `first`, quantized: tensors by their full names."""
    tensors = rounded_head(scheme, family.head, load_file(first / _HEAD), device).tensors
    return {f"{family.head}.{name}": tensor for name, tensor in tensors.items()}


def _write_tensors(
    folder: Path,
    empty: dict[str, Tensor],
    family: Family,
    first: Path | None,
    device: torch.device,
    head: dict[str, Tensor] | None,
) -> None:
    """Values for tensors without any. All but transforms, and the tensors of `head`, are links to the files in `first`,
    if it is there."""
    listed: dict[str, str] = {}
    generator = torch.Generator(device).manual_seed(0)
    for file, names in _files_of(empty, family):
        if head is not None and file == _HEAD:
            save_file({name: head[name].contiguous() for name in names}, folder / file, {"format": "pt"})
        elif first is not None and file != _TRANSFORMS:
            os.link(first / file, folder / file)
        else:
            values = {name: _drawn(name, empty[name], generator) for name in names}
            save_file(values, folder / file, {"format": "pt"})
        listed |= dict.fromkeys(names, file)
    _write_json(folder / _INDEX, {"metadata": {}, "weight_map": listed})


def _files_of(names: dict[str, Tensor], family: Family) -> Iterator[tuple[str, list[str]]]:
    """File by file, which tensors it holds: a file for each decoder block, one for the head, one for the rest, one for
    the transforms of all blocks."""
    files: dict[str, list[str]] = {}
    for name in names:
        number = name.removeprefix(f"{family.blocks}.").partition(".")[0]
        file = f"block-{number}.safetensors" if name.startswith(f"{family.blocks}.") else "rest.safetensors"
        file = _TRANSFORMS if is_of_transform(name) else file
        file = _HEAD if name.startswith(f"{family.head}.") else file
        files.setdefault(file, []).append(name)
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


def head_choice(text: str) -> HeadChoice:
    """A head as for `mxrot quantize --head`."""
    try:
        return HeadChoice.named(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--head", type=head_choice, action="append", default=[], metavar="FORMAT", help="repeatable")
    options = parser.parse_args(arguments)
    shape = options.hidden, options.ffn, options.blocks, options.heads, options.kv_heads, options.vocabulary
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_random(options.folder, llama_config(*shape), device, options.head)
    return 0


if __name__ == "__main__":
    sys.exit(main())
