"""Text that a model writes from several devices, beside what it writes from one: seconds, and whether tokens differ.

    python benchmarks/spread_text.py --model demo --devices cuda:0,cuda:1 --limit 0.4,0.4 --windows 32

`--limit` makes GPUs small: so many GB of each count as free. What they do not hold together comes from main memory, and
beyond `--host` GB of that from disk. The whole model writes on the first device, as many sequences at a time. Ends with
1 where a token differs: kernels are the same on GPUs of one kind, so none should.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.calibration import generated_windows, generation
from mxrot.calibration.spreading import Room, Spread, spread_over
from mxrot.calibration.writing_sizes import WritingSizes
from mxrot.environment import device_name, versions
from mxrot.models import FolderSource, build_skeleton, find_model
from mxrot.quantizing.loading import compute_dtype
from mxrot.quantizing.spread_original import opened_original
from mxrot.sections import CalibrationChoice


def main() -> None:
    options = parse_options()
    row = measure(FolderSource(find_model(options.model)), options)
    print(described(row), flush=True)
    if options.json is not None:
        record = {"command": shlex.join(sys.argv), "model": options.model, **row}
        record |= {"device": device_name(torch.device(row["devices"][0])), "versions": versions()}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    if row["are_equal"] is False:
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="separated by commas")
    parser.add_argument("--limit", default="0.4,0.4", help="GB of each that count as free")
    parser.add_argument("--host", type=float, default=1e6, help="GB of main memory that count as free")
    parser.add_argument("--disk", type=float, default=1e6, help="GB of disk that count as free")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument(
        "--alone", action=argparse.BooleanOptionalAction, default=True, help="write from one device, too"
    )
    parser.add_argument("--json")
    return parser.parse_args()


def measure(source: FolderSource, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both ways, once each; `are_equal` is None where one device was not tried."""
    devices = tuple(options.devices.split(","))
    main_device = torch.device(devices[0])
    dtype = compute_dtype(source.dtype, main_device)
    choice = CalibrationChoice(own=options.windows)
    sizes = WritingSizes.of(build_skeleton(source.config), source.family, choice, (0, options.seq_len), dtype)
    limits = tuple(1e9 * float(limit) for limit in options.limit.split(","))
    spread = spread_over(sizes, Room(devices, limits, 1e9 * options.host, 1e9 * options.disk))
    if spread is None:
        raise SystemExit(f"{devices[0]} holds it: {sizes.on_one_device / 1e9:.2f} GB; lower the first --limit")
    with opened_original(source, dtype, main_device, spread) as model:
        written, seconds = timed(model, options)
    row: dict[str, Any] = {
        "devices": devices,
        "said": spread.said,
        "spread": spread.as_table(),
        "tokens": written.numel(),
        "seconds": seconds,
        "planned_seconds_to_stream": spread.seconds_to_stream,
        "seconds_alone": None,
        "are_equal": None,
    }
    if options.alone:
        with opened_original(source, dtype, main_device, None) as model, written_together(spread):
            alone, row["seconds_alone"] = timed(model, options)
        row["are_equal"] = bool(torch.equal(written, alone))
    return row


def timed(model: PreTrainedModel, options: argparse.Namespace) -> tuple[Tensor, float]:
    """The windows, and the seconds in which they were written."""
    started = time.perf_counter()
    found = generated_windows(model, options.windows, options.seq_len, torch.Generator().manual_seed(0))
    return found, time.perf_counter() - started


@contextmanager
def written_together(spread: Spread) -> Iterator[None]:
    """While open, a whole model writes as many sequences at a time: others draw other tokens."""
    names = ("SEQUENCES_AT_ONCE", "CACHE_BYTES", "CACHE_BESIDE_IT")
    before = {name: getattr(generation, name) for name in names}
    generation.SEQUENCES_AT_ONCE, generation.CACHE_BESIDE_IT = spread.at_once, 1e18
    generation.CACHE_BYTES = dict.fromkeys(generation.CACHE_BYTES, 1e18)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(generation, name, value)


def described(row: dict[str, Any]) -> str:
    def rate(seconds: float) -> str:
        return f"{seconds:.1f} s, {row['tokens'] / seconds:.0f} tokens a second"

    planned = row["planned_seconds_to_stream"]
    lines = [row["said"], f"spread: {rate(row['seconds'])} (planned {planned:.1f} s for weights on their way)"]
    if row["are_equal"] is not None:
        same = "the same tokens" if row["are_equal"] else "OTHER TOKENS"
        lines.append(f"on {row['devices'][0]} alone: {rate(row['seconds_alone'])}; {same}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
