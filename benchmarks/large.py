"""Time and memory of a recipe on a model of a given shape, with random weights.

    python benchmarks/large.py --blocks 2 --recipe mxrot --out benchmarks/results

Writes a Llama-shaped model of random weights (that of Llama-3-8B unless told) with few decoder blocks into a
temporary folder, quantizes it on random tokens, one block on the device at a time, and prints when each block begins.
All blocks are alike, so a whole model takes their time as often as it has blocks. Perplexity means nothing here.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mxrot import api
from mxrot.bench import llama_config, random_model
from mxrot.environment import device_name, versions
from mxrot.quantizing import run as pipeline
from mxrot.recipe import load_recipe
from mxrot.surgery import stored_tensors


def main() -> None:
    options = parse_options()
    device = torch.device(options.device or api.default_device())
    changes = dict(change.split("=", 1) for change in options.change)
    recipe = load_recipe(options.recipe).changed({key: json.loads(value) for key, value in changes.items()})
    options.out.mkdir(parents=True, exist_ok=True)
    kind = device_name(device).lower().replace(" ", "-")
    path = options.out / f"large_{options.recipe}_{kind}_{time.strftime('%Y-%m-%d')}.json"
    described: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": options.commit,
        "device": device_name(device),
        "machine": platform.machine(),
        "versions": versions(),
        "recipe_toml": recipe.to_toml(),
        "shape": vars(options) | {"out": None, "work": None},
    }
    told: list[tuple[str, float, int]] = []

    def progress(done: int, total: int, what: str) -> None:
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        told.append((what, time.monotonic() - started, peak))
        print(f"{told[-1][1]:7.1f} s, {peak / 1e9:5.1f} GB of GPU memory: {what}", flush=True)
        # What there is so far stays, should the run be ended.
        path.write_text(json.dumps(described | {"steps": told}, indent=1, default=str) + "\n")

    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        write_random_model(folder, options, device)
        generator = torch.Generator().manual_seed(0)
        shape = (options.samples, options.seq_len)
        windows = torch.randint(0, options.vocabulary, shape, generator=generator)
        started = time.monotonic()
        result = pipeline.quantize(folder, recipe, windows=windows, device=device, store=Nowhere(), progress=progress)
        seconds = time.monotonic() - started
    blocks = [block.seconds for block in result.record.blocks]
    peak = result.record.peak_gpu_bytes
    print(f"{options.recipe}: {seconds:.1f} s in all; a block {' '.join(f'{s:.1f}' for s in blocks)} s", flush=True)
    print(f"a model of {options.whole} blocks: about {options.whole * blocks[-1] / 60:.0f} minutes", flush=True)
    if peak is not None:
        print(f"peak GPU memory {peak / 1e9:.1f} GB")
    measured = {
        "seconds": seconds,
        "block_seconds": blocks,
        "peak_gpu_bytes": peak,
        "tuning": [[vars(check) for check in block.tuning or []] for block in result.record.blocks],
        "steps": told,
    }
    path.write_text(json.dumps(described | measured, indent=1, default=str) + "\n")
    print(f"written: {path}")


class Nowhere:
    """A store that keeps nothing: blocks leave the device, as they do when a checkpoint is written."""

    tuning_checkpoint = None

    def load(self, index: int) -> None:
        return None

    def save(self, index: int, tensors: object, report: object) -> None:
        return None

    def save_rest(self, tensors: object) -> None:
        return None


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipe", default="mxrot")
    parser.add_argument("--change", action="append", default=[], help="KEY=JSON of the recipe; may be repeated")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--whole", type=int, default=32, help="blocks of the model that this stands for")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default=None)
    parser.add_argument("--work", default=None, help="where the model is written")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def write_random_model(folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    """A model of normal weights, 1/sqrt(inputs) wide, in bfloat16, drawn on the device."""
    shape = options.hidden, options.ffn, options.blocks, options.heads, options.kv_heads, options.vocabulary
    model = random_model(llama_config(*shape), device)
    model.config.save_pretrained(folder)
    tensors = {name: tensor.cpu() for name, tensor in stored_tensors(model, torch.bfloat16).items()}
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
