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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tables import TABLES, Run
from torch import Tensor

from mxrot import api, pipeline
from mxrot.calibration import load_text, token_windows
from mxrot.evaluation import perplexity
from mxrot.models import find_model
from mxrot.recipe import load_recipe
from mxrot.records import device_name, versions


def main() -> None:
    options = parse_options()
    device = options.device or api.default_device()
    bench = Bench.prepare(options, device)
    for table in options.table.split(","):
        rows = []
        for run in TABLES[table]:
            if options.only and not any(part in run.label for part in options.only.split("|")):
                continue
            rows.append(measure(run, bench))
            compare_with_original(rows)
            print(line(rows[-1]), flush=True)
            path = write_result(table, rows, bench)  # after each row: a run that is cut off leaves what it has
        print_table(rows)
        print(f"written: {path}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--table", default="base", help=f"one or more of {', '.join(TABLES)}, comma-separated")
    parser.add_argument("--only", default="", help="only runs whose label contains one of these, separated by |")
    parser.add_argument("--text", action="append", help="evaluation text, NAME=FILE; may be repeated (demo)")
    parser.add_argument("--calib", default="demo")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--no-perplexity", action="store_true", help="only quantize, for times")
    parser.add_argument("--device", default=None)
    parser.add_argument("--commit", default=None, help="what is measured, where there is no git checkout")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.text = options.text or ["demo"]
    return options


@dataclass(frozen=True)
class Bench:
    """What all runs share: the model, and texts that are tokenized once."""

    options: argparse.Namespace
    device: str
    folder: Path
    texts: dict[str, str]
    """SHA-256 of each evaluation text, by its name."""
    windows: dict[str, Tensor]
    calibration: Tensor

    @staticmethod
    def prepare(options: argparse.Namespace, device: str) -> Bench:
        folder = find_model(options.model)
        tokenizer = api.load_tokenizer(folder)
        texts = [load_text(spec, "evaluation") for spec in options.text]
        windows = {text.name: token_windows(text, tokenizer, options.seq_len, options.windows) for text in texts}
        calib = load_text(options.calib, "calibration")
        calibration = token_windows(calib, tokenizer, options.seq_len, options.samples, spread=True)
        digests = {text.name: text.digest for text in texts} | {f"calibration {calib.name}": calib.digest}
        return Bench(options, device, folder, digests, windows, calibration)

    @property
    def batch(self) -> int:
        tokens = api.EVALUATION_TOKENS.get(torch.device(self.device).type, 2048)
        return max(1, tokens // self.options.seq_len)


def measure(run: Run, bench: Bench) -> dict[str, Any]:
    """Every seed of one run."""
    row: dict[str, Any] = {"label": run.label, "recipe": run.recipe, "changes": run.changes, "seeds": []}
    for seed in run.seeds:
        entry: dict[str, Any] = {"seed": seed}
        if run.recipe is None:
            model, _ = api.open_model(bench.folder, bench.device)
        else:
            recipe = load_recipe(run.recipe).changed(run.changes)
            windows = None if recipe.is_data_free else bench.calibration
            result = pipeline.quantize(bench.folder, recipe, windows=windows, device=bench.device, seed=seed)
            assert result.model is not None
            model = result.model
            entry |= {"quantize_seconds": result.record.seconds, "peak_gpu_bytes": result.record.peak_gpu_bytes}
            row |= {"recipe_toml": recipe.to_toml(), "calibration_windows": result.record.windows}
            del result
        if not bench.options.no_perplexity:
            entry["perplexity"] = {
                name: vars(perplexity(model, windows, bench.batch)) for name, windows in bench.windows.items()
            }
        row["seeds"].append(entry)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    if not bench.options.no_perplexity:
        first = next(iter(row["seeds"][0]["perplexity"]))
        found = [entry["perplexity"][first]["ppl"] for entry in row["seeds"]]
        mean = sum(found) / len(found)
        row |= {"mean": mean, "spread": max(found) - min(found), "low": run.low, "high": run.high}
        row["holds"] = run.low <= mean <= run.high
        row["relative_bound"] = run.relative
    return row


def compare_with_original(rows: list[dict[str, Any]]) -> None:
    """Add to the last row its mean perplexity on each text relative to that of the unquantized model."""
    original = next((row for row in rows if row["recipe"] is None and "mean" in row), None)
    if original is None or "mean" not in rows[-1]:
        return
    row = rows[-1]
    row["relative"] = {
        name: sum(entry["perplexity"][name]["ppl"] for entry in row["seeds"])
        / len(row["seeds"])
        / original["seeds"][0]["perplexity"][name]["ppl"]
        for name in original["seeds"][0]["perplexity"]
    }
    second = list(row["relative"].values())[1:2]
    row["holds"] = row["holds"] and all(value <= row["relative_bound"] for value in second)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    seconds = [entry["quantize_seconds"] for entry in row["seeds"] if "quantize_seconds" in entry]
    peaks = [entry["peak_gpu_bytes"] or 0 for entry in row["seeds"] if "peak_gpu_bytes" in entry]
    text = f"{row['label']:28s}"
    if "mean" in row:
        bounds = f"{row['low']:.2f} to {row['high']:.2f}" if row["high"] < float("inf") else ""
        verdict = ("ok" if row["holds"] else "MISSED") if bounds else ""
        text += f" {row['mean']:8.3f}  spread {row['spread']:6.3f}  {bounds:18s} {verdict:7s}"
    if "relative" in row:
        text += " relative " + " ".join(f"{value:.3f}" for value in row["relative"].values())
    if seconds:
        text += f" quantized in {' '.join(f'{value:.2f}' for value in seconds)} s, peak {max(peaks) / 1e9:.2f} GB"
    return text


def print_table(rows: list[dict[str, Any]]) -> None:
    print("\n" + "\n".join(line(row) for row in rows), flush=True)


def write_result(table: str, rows: list[dict[str, Any]], bench: Bench) -> Path:
    """Write what there is; the file's path."""
    options = bench.options
    name = device_name(torch.device(bench.device)).lower().replace(" ", "-")
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": options.commit or _commit(),
        "model": options.model,
        "device": name,
        "machine": platform.machine(),
        "versions": versions(),
        "texts": bench.texts,
        "windows": options.windows,
        "seq_len": options.seq_len,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.model.replace('/', '-')}_{table}_{name}_{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return path


def _commit() -> str:
    """The commit that was measured; `unknown` outside of a git checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


if __name__ == "__main__":
    main()
