"""Perplexity of recipes by the protocol of docs/methods.md, and the time it takes to quantize.

    python benchmarks/accuracy.py --text wikitext=wiki.test.raw --calib wiki.train.txt --table base --out results/

A table is a list of runs: a recipe, keys to change, seeds, and the bounds its perplexity must meet. Runs are
made one after the other in one process; the first is not warmed up by anything, so times are read off the
repeated `time` table. Prints one line a run as it ends, the table last, and writes JSON with everything that is
needed to do a run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mxrot import api, pipeline
from mxrot.calibration import load_text
from mxrot.models import find_model
from mxrot.recipe import load_recipe


@dataclass(frozen=True)
class Run:
    """One row: a recipe with changes, over seeds; the mean perplexity must lie in [low, high]."""

    label: str
    recipe: str | None
    """None is the model as it is."""
    changes: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    low: float = 0.0
    high: float = float("inf")


FLOOR = {"weights.rule": "floor", "activations.rule": "floor"}
BLOCK = {"transform.sharing": "block"}
SMOOTH = {"smoothing.alpha": 0.6}
THREE = (0, 1, 2)


def around(value: float, share: float) -> dict[str, float]:
    """Bounds `share` below and above `value`."""
    return {"low": value * (1 - share), "high": value * (1 + share)}


TABLES = {
    "base": (
        Run("FP16", None, **around(21.77, 0.003)),
        Run("rtn, even", "rtn", **around(65.5, 0.03)),
        Run("rtn, floor", "rtn", FLOOR, **around(108.4, 0.03)),
        Run("hadamard", "hadamard"),
        Run("smoothquant", "smoothquant"),
        Run("smoothing + hadamard", "hadamard", SMOOTH, **around(37.3, 0.03)),
        Run("duquant++ (site)", "duquant++", seeds=THREE, high=37.6),
        Run("duquant++ (block)", "duquant++", BLOCK, seeds=THREE, high=36.4),
        Run("duquant++-gptq (block)", "duquant++-gptq", seeds=THREE, high=31.0),
        Run("duquant++-released", "duquant++-released", low=31.0, high=33.5),
        Run("duquant++-released-gptq", "duquant++-released-gptq", low=28.5, high=30.5),
    ),
    "time": (
        Run("warm-up", "duquant++"),
        Run("duquant++", "duquant++", seeds=THREE),
        Run("duquant++-gptq (block)", "duquant++-gptq", seeds=THREE),
    ),
    "smoke": (Run("original", None), Run("rtn", "rtn"), Run("duquant++", "duquant++")),
}


def main() -> None:
    options = parse_options()
    device = options.device or api.default_device()
    texts = [load_text(spec, "evaluation") for spec in options.text]
    rows = []
    for run in TABLES[options.table]:
        if options.only and options.only not in run.label:
            continue
        rows.append(measure(run, options, device))
        print(line(rows[-1]), flush=True)
    print_table(rows)
    write_result(rows, texts, options, device)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--table", default="base", choices=sorted(TABLES))
    parser.add_argument("--only", default="", help="only runs whose label contains this")
    parser.add_argument("--text", action="append", help="evaluation text, NAME=FILE; may be repeated (demo)")
    parser.add_argument("--calib", default="demo")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--no-perplexity", action="store_true", help="only quantize, for times")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.text = options.text or ["demo"]
    return options


def measure(run: Run, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Every seed of one run."""
    row: dict[str, Any] = {"label": run.label, "recipe": run.recipe, "changes": run.changes, "seeds": []}
    folder = find_model(options.model)
    tokenizer = api.load_tokenizer(folder)
    for seed in run.seeds:
        entry: dict[str, Any] = {"seed": seed}
        if run.recipe is None:
            model, _ = api.open_model(folder, device)
        else:
            recipe = load_recipe(run.recipe).changed(run.changes)
            data = api.calibrate(folder, recipe, options.calib, options.samples, options.seq_len)
            result = pipeline.quantize(folder, recipe, windows=data.windows, device=device, seed=seed)
            assert result.model is not None
            model = result.model
            entry |= {"quantize_seconds": result.record.seconds, "peak_gpu_bytes": result.record.peak_gpu_bytes}
            row |= {"recipe_toml": recipe.to_toml(), "calibration": data.description}
            del result
        if not options.no_perplexity:
            scores = api.evaluate(
                model, options.text, tokenizer=tokenizer, windows=options.windows, seq_len=options.seq_len
            )
            entry["perplexity"] = {name: vars(score) for name, score in scores.items()}
        row["seeds"].append(entry)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    if not options.no_perplexity:
        first = next(iter(row["seeds"][0]["perplexity"]))
        found = [entry["perplexity"][first]["ppl"] for entry in row["seeds"]]
        mean = sum(found) / len(found)
        row |= {"mean": mean, "spread": max(found) - min(found), "low": run.low, "high": run.high}
        row["holds"] = run.low <= mean <= run.high
    return row


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    seconds = [entry["quantize_seconds"] for entry in row["seeds"] if "quantize_seconds" in entry]
    peaks = [entry["peak_gpu_bytes"] or 0 for entry in row["seeds"] if "peak_gpu_bytes" in entry]
    text = f"{row['label']:28s}"
    if "mean" in row:
        bounds = f"{row['low']:.2f} to {row['high']:.2f}" if row["high"] < float("inf") else ""
        verdict = ("ok" if row["holds"] else "MISSED") if bounds else ""
        text += f" {row['mean']:8.3f}  spread {row['spread']:6.3f}  {bounds:18s} {verdict:7s}"
    if seconds:
        text += f" quantized in {' '.join(f'{value:.2f}' for value in seconds)} s, peak {max(peaks) / 1e9:.2f} GB"
    return text


def print_table(rows: list[dict[str, Any]]) -> None:
    print("\n" + "\n".join(line(row) for row in rows), flush=True)


def write_result(rows: list[dict[str, Any]], texts: list[Any], options: argparse.Namespace, device: str) -> None:
    name = pipeline.device_name(torch.device(device)).lower().replace(" ", "-")
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "model": options.model,
        "device": name,
        "machine": platform.machine(),
        "versions": pipeline.versions(),
        "texts": {text.name: text.digest for text in texts},
        "windows": options.windows,
        "seq_len": options.seq_len,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.model.replace('/', '-')}_{options.table}_{name}_{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"written: {path}", flush=True)


def _commit() -> str:
    """The commit that was measured; `unknown` outside of a git checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


if __name__ == "__main__":
    main()
