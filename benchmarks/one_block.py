"""GPU memory that quantizing one decoder block takes, beside what `mxrot plan` says of it.

    python benchmarks/one_block.py --config config.json --windows 128 --json one_block.json

Writes a model of two decoder blocks of the config's shape (that of Llama-3.1-70B unless told), with random weights,
into a temporary folder, quantizes the first of them on random tokens, and stops there: a whole model takes no more,
because one block is on the device at a time. The second is there so that the block's outputs are made, as they are in
the midst of a model. Perplexity means nothing here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mxrot import api
from mxrot.bench import llama_config, random_model
from mxrot.environment import device_name, versions
from mxrot.layers import build_apart
from mxrot.models import find_family, read_config
from mxrot.planning import MemoryEstimate, ModelShape, Run, estimate_memory
from mxrot.quantizing.run import quantize
from mxrot.recipe import Recipe, load_recipe
from mxrot.surgery import stored_tensors

BLOCKS = 2


def main() -> None:
    options = parse_options()
    device = torch.device(options.device or api.default_device())
    changes = {"calibration.generated": "0"} | dict(change.split("=", 1) for change in options.change)
    recipe = load_recipe(options.recipe).changed({key: json.loads(value) for key, value in changes.items()})
    config = config_of(options)
    estimate = estimate_of(config, recipe, options, device)
    measured = Measured(device)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        write_random_model(folder, config, device)
        generator = torch.Generator().manual_seed(0)
        windows = torch.randint(0, config.vocab_size, (options.windows, options.seq_len), generator=generator)
        started = time.monotonic()
        try:
            quantize(folder, recipe, windows=windows, device=device, store=FirstBlock(), progress=measured.see)
        except FirstBlockDone:
            measured.end()
        seconds = time.monotonic() - started
    print(f"{options.recipe}, {options.windows} windows of {options.seq_len}: {seconds:.1f} s on {device_name(device)}")
    show(estimate, measured)
    if options.json is not None:
        stages = [{"stage": stage.name, "bytes": stage.total, "terms": stage.terms} for stage in estimate.stages]
        found = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": options.commit,
            "device": device_name(device),
            "versions": versions(),
            "recipe_toml": recipe.to_toml(),
            "config": config.to_diff_dict(),
            "windows": [options.windows, options.seq_len],
            "seconds": seconds,
            "planned": {"peak_bytes": estimate.peak.total, "peak_at": estimate.peak.name, "stages": stages},
            "measured": {
                "peak_bytes": max((peak for _, peak in measured.peaks), default=None),
                "steps": measured.peaks,
            },
        }
        options.json.write_text(json.dumps(found, indent=1, default=str) + "\n")


def show(estimate: MemoryEstimate, measured: Measured) -> None:
    """Both, stage by stage and step by step."""
    planned = estimate.peak
    print(f"planned  {planned.total / 1e9:7.2f} GB at {planned.name!r}")
    for stage in estimate.stages:
        print(f"         {stage.total / 1e9:7.2f} GB {stage.name}")
    if not measured.peaks:
        print("measured: nothing, there is no GPU here")
        return
    what, peak = max(measured.peaks, key=lambda found: found[1])
    print(f"measured {peak / 1e9:7.2f} GB at {what!r}: {100 * (peak / planned.total - 1):+.1f} % of what was planned")
    for what, peak in measured.peaks:
        print(f"         {peak / 1e9:7.2f} GB {what}")


@dataclass
class Measured:
    """The most GPU memory of each step, from one word of the quantizing to the next."""

    device: torch.device
    peaks: list[tuple[str, int]] = field(default_factory=list)
    step: str = "loading"

    def see(self, done: float, total: int, what: str) -> None:
        self.end()
        self.step = f"{done:.2f} of {total} {what}"

    def end(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peaks.append((self.step, torch.cuda.max_memory_allocated(self.device)))
            torch.cuda.reset_peak_memory_stats(self.device)


class FirstBlockDone(Exception):  # noqa: N818
    """Nothing else is wanted."""


class FirstBlock:
    """A store that takes the first block and ends the run."""

    tuning_checkpoint = orders_checkpoint = None

    def load(self, index: int) -> None:
        return None

    def save(self, index: int, tensors: object, report: object) -> None:
        raise FirstBlockDone

    def save_rest(self, tensors: object) -> None:
        return None

    def load_windows(self, purpose: str) -> None:
        return None

    def save_windows(self, purpose: str, windows: torch.Tensor) -> None:
        return None


def config_of(options: argparse.Namespace) -> Any:
    """Two blocks of the shape that was asked for."""
    if options.config is None:
        config = llama_config(8192, 28672, BLOCKS, 64, 8, 128256)
    else:
        config = read_config(options.config)
        config.num_hidden_layers = BLOCKS
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:BLOCKS]
    if options.vocabulary is not None:
        config.vocab_size = options.vocabulary
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return config


def estimate_of(config: Any, recipe: Recipe, options: argparse.Namespace, device: torch.device) -> MemoryEstimate:
    """What `plan` says of the device."""
    shape = ModelShape.of(build_apart(config), find_family(config, "the model"), recipe)
    return estimate_memory(Run(shape, recipe, device.type, torch.bfloat16, options.windows, options.seq_len))


def write_random_model(folder: Path, config: Any, device: torch.device) -> None:
    """Normal weights, 1/sqrt(inputs) wide, in bfloat16, drawn on the device."""
    model = random_model(config, device)
    model.config.save_pretrained(folder)
    tensors = {name: tensor.cpu() for name, tensor in stored_tensors(model, torch.bfloat16).items()}
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, help="a config.json, or a folder with one")
    parser.add_argument("--recipe", default="mxrot")
    parser.add_argument("--change", action="append", default=[], help="KEY=JSON of the recipe; may be repeated")
    parser.add_argument("--windows", type=int, default=128, help="of random tokens")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, help="tokens, for less to write (the config's)")
    parser.add_argument("--device")
    parser.add_argument("--work", help="where the model is written")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
