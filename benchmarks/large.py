"""Time and memory of a recipe on a model of a given shape, with random weights.

    python benchmarks/large.py --blocks 2 --recipe mxrot --out benchmarks/results
    torchrun --nproc-per-node 2 benchmarks/large.py --config config.json --name qwen3-30b-a3b --blocks 2

Writes a model of random weights (of the shape of Llama-3-8B unless told) with few decoder blocks into a temporary
folder, quantizes it on random tokens, one block on the device at a time, and prints when each block begins, and what
was planned of time and memory beside what was measured. All blocks are alike, so a whole model takes their time as
often as it has blocks. Perplexity means nothing here. Several processes quantize it together. `--profile 40` prints
the 40 functions and lines of mxrot that each process spent most time in; with CUDA_LAUNCH_BLOCKING=1 that is where the
GPU was busy, too, and everything is slower.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
import time
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from sampling import sampled

from mxrot import api
from mxrot.bench import llama_config, random_model
from mxrot.calibration import World
from mxrot.environment import device_name, versions
from mxrot.models import read_config
from mxrot.planning import Machine, make_plan
from mxrot.quantizing import run as pipeline
from mxrot.ranks import joined
from mxrot.recipe import Recipe, load_recipe


def main() -> None:
    options = parse_options()
    with joined(options.device) as world:
        measure(options, world)


def measure(options: argparse.Namespace, world: World) -> None:
    device = torch.device(world.device or options.device or api.default_device())
    config = config_of(options)
    blocks_of_model = config.num_hidden_layers
    changes = dict(change.split("=", 1) for change in options.change)
    recipe = load_recipe(options.recipe).changed({key: json.loads(value) for key, value in changes.items()})
    options.out.mkdir(parents=True, exist_ok=True)
    kind = device_name(device).lower().replace(" ", "-")
    name = "large" if options.name is None else f"large-{options.name}"
    name += "" if world.size == 1 else f"-{world.size}-processes"
    path = options.out / f"{name}_{options.recipe}_{kind}_{time.strftime('%Y-%m-%d')}.json"
    planned: dict[str, Any] = {}
    described: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": options.commit,
        "device": device_name(device),
        "machine": platform.machine(),
        "versions": versions(),
        "recipe_toml": recipe.to_toml(),
        "processes": world.size,
        "planned": planned,
        "shape": vars(options) | {"out": None, "work": None},
        "config": config.to_diff_dict(),
    }
    told: list[tuple[str, float, int]] = []

    def progress(done: int, total: int, what: str) -> None:
        if world.rank:
            return
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        told.append((what, time.monotonic() - started, peak))
        print(f"{told[-1][1]:7.1f} s, {peak / 1e9:5.1f} GB of GPU memory: {what}", flush=True)
        # What there is so far stays, should the run be ended.
        path.write_text(json.dumps(described | {"steps": told}, indent=1, default=str) + "\n")

    with tempfile.TemporaryDirectory(dir=options.work) as place:
        folder = Path(world.hand_out(place))
        if not world.rank:
            write_random_model(folder, config, options.blocks, device)
            planned |= plan_of(folder, recipe, options, device, world.size)
        generator = torch.Generator().manual_seed(0)
        shape = (options.samples, options.seq_len)
        windows = torch.randint(0, config.vocab_size, shape, generator=generator)
        world.count(0)  # the model is there
        started = time.monotonic()
        options_of_run: dict[str, Any] = {"windows": windows, "device": device, "progress": progress, "world": world}
        options_of_run["store"] = None if world.rank else Nowhere()
        with sampled() if options.profile else nullcontext() as samples:
            result = pipeline.quantize(folder, recipe, **options_of_run)
            world.count(0)  # all are done
        seconds = time.monotonic() - started
    for rank in range(world.size if samples else 0):
        if samples and rank == world.rank:
            print(f"process {rank}", samples.table(options.profile), sep="\n", flush=True)
        world.count(0)
    if world.rank:
        return
    blocks = [block.seconds for block in result.record.blocks]
    peak = result.record.peak_gpu_bytes
    print(f"{options.recipe}: {seconds:.1f} s in all; a block {' '.join(f'{s:.1f}' for s in blocks)} s", flush=True)
    print(f"{blocks_of_model} blocks: about {blocks_of_model * blocks[-1] / 60:.0f} minutes", flush=True)
    show_plan(planned, seconds, peak)
    measured = {
        "seconds": seconds,
        "block_seconds": blocks,
        "peak_gpu_bytes": peak,
        "tuning": [[vars(check) for check in block.tuning or []] for block in result.record.blocks],
        "steps": told,
    }
    path.write_text(json.dumps(described | measured, indent=1, default=str) + "\n")
    print(f"written: {path}")


def plan_of(
    folder: Path, recipe: Recipe, options: argparse.Namespace, device: torch.device, processes: int
) -> dict[str, Any]:
    """What `mxrot plan` says of the few blocks, on this machine."""
    made = make_plan(folder.name, folder, recipe, Machine(device), options.samples, options.seq_len, processes)
    if made.time is None or made.needs is None:
        raise SystemExit("\n".join(made.problems))
    memory = {name: getattr(made.needs, name) for name in ("gpu", "gpu_host", "cpu")}
    return {
        "seconds": made.time.terms,
        "rates": made.time.rates.as_table(),
        "memory": {name: {stage.name: stage.total for stage in needed.stages} for name, needed in memory.items()},
    }


def show_plan(planned: dict[str, Any], seconds: float, peak: int | None) -> None:
    """Beside what was measured. No checkpoint is written, so the plan's files are counted out."""
    terms = {name: value for name, value in planned["seconds"].items() if name != "files"}
    total = sum(terms.values())
    print(f"planned {total:.1f} s, measured {seconds:.1f} s: {100 * (seconds / total - 1):+.0f} %")
    print("  " + ", ".join(f"{name} {value:.1f} s" for name, value in terms.items()))
    if peak is not None:
        stage, most = max(planned["memory"]["gpu"].items(), key=lambda one: one[1])
        print(f"planned {most / 1e9:.1f} GB ({stage}), measured {peak / 1e9:.1f} GB: {100 * (peak / most - 1):+.0f} %")


class Nowhere:
    """A store that keeps nothing: blocks leave the device, as they do when a checkpoint is written."""

    tuning_checkpoint = orders_checkpoint = None

    def load(self, index: int) -> None:
        return None

    def load_windows(self, purpose: str) -> None:
        return None

    def save_windows(self, purpose: str, windows: object) -> None:
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
    parser.add_argument("--config", type=Path, default=None, help="config.json, in place of what follows")
    parser.add_argument("--name", default=None, help="of the shape, in the name of the file that is written")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default=None)
    parser.add_argument("--profile", type=int, default=0, help="print so many functions by the time spent in them")
    parser.add_argument("--work", default=None, help="where the model is written")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def config_of(options: argparse.Namespace) -> Any:
    """Of the whole model."""
    if options.config is not None:
        return read_config(options.config)
    shape = options.hidden, options.ffn, options.whole, options.heads, options.kv_heads, options.vocabulary
    return llama_config(*shape)


def write_random_model(folder: Path, config: Any, blocks: int, device: torch.device) -> None:
    """A model of so many blocks, of normal weights 1/sqrt(inputs) wide, in bfloat16, drawn on the device."""
    few = deepcopy(config)
    few.num_hidden_layers = blocks
    if getattr(few, "layer_types", None):
        few.layer_types = few.layer_types[:blocks]
    model = random_model(few, device).cpu()
    model.save_pretrained(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
