"""Perplexity of recipes by the protocol of docs/methods.md, and the time it takes to quantize.

    python benchmarks/accuracy.py --text wikitext=wiki.test.raw --calib wiki.train.txt --table base --out results/

A table is a list of runs (benchmarks/tables.py): a recipe, keys to change, seeds, and the bounds its perplexity must
meet. Runs are made one after the other; the first is not warmed up by anything, so times are read off the repeated
`time` table. With several GPUs each has a process of its own, and takes the next run and seed that nobody has taken.
Prints a line for each seed as it ends and the table last, and writes JSON with everything that is needed to do a run
again. A long table is measured in pieces by `--stop-after` and `--known`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tables import TABLES, Run
from torch import Tensor

from mxrot import api
from mxrot.checkpoint import quantize_to_folder
from mxrot.environment import device_name, versions
from mxrot.errors import MxrotError
from mxrot.evaluation import perplexity
from mxrot.models import find_model, read_config, start_token
from mxrot.quantizing import run as pipeline
from mxrot.quantizing.record import RunRecord
from mxrot.recipe import Recipe, load_recipe
from mxrot.text import load_text, token_windows

Entry = dict[str, Any]
"""What one seed of one run has given."""


def main() -> None:
    options = parse_options()
    if options.claims is None and options.device is None and torch.cuda.device_count() > 1:
        measure_in_parallel(options, torch.cuda.device_count())
    else:
        measure_units(options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--table", default="base", help=f"one of {', '.join(TABLES)}")
    parser.add_argument("--only", default="", help="only runs whose label contains one of these, separated by |")
    parser.add_argument("--text", action="append", help="evaluation text, NAME=FILE; may be repeated (demo)")
    parser.add_argument("--calib", default="demo")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--no-perplexity", action="store_true", help="only quantize, for times")
    parser.add_argument("--reload", action="store_true", help="quantize again into a checkpoint, and measure that too")
    parser.add_argument("--device", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="only these of each run's seeds")
    parser.add_argument("--claims", type=Path, default=None, help="a folder by which processes share the runs")
    parser.add_argument("--known", type=Path, nargs="+", default=[], help="results that need not be measured again")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which no run is begun")
    parser.add_argument("--commit", default=None, help="what is measured, where there is no git checkout")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.text = options.text or ["demo"]
    return options


def chosen_runs(options: argparse.Namespace) -> list[Run]:
    """The runs of the table that were asked for."""
    wanted = options.only.split("|")
    return [run for run in TABLES[options.table] if any(part in run.label for part in wanted)]


def measure_units(options: argparse.Namespace) -> None:
    """Measure what nobody else has taken, in this process; results are written after each seed."""
    started = time.monotonic()
    bench = Bench.prepare(options, options.device or api.default_device())
    entries = known_entries(options.known, bench.description())
    known = {(entry["label"], entry["seed"]) for entry in entries}
    units = [(run, seed) for run in chosen_runs(options) for seed in run.seeds]
    part = f"part-{os.getpid()}" if options.claims else ""
    for index, (run, seed) in enumerate(units):
        if (run.label, seed) in known or (options.seeds is not None and seed not in options.seeds):
            continue
        if time.monotonic() - started > options.stop_after:
            print(f"stopped after {options.stop_after:.0f} s", flush=True)
            break
        if options.claims and not claimed(options.claims, f"{options.table}-{index}"):
            continue
        entries.append({"label": run.label, "seed": seed} | measure(run, seed, bench))
        print(line(summary(run, entries[-1:])), flush=True)
        write_result(options, bench.description(), entries, part)
    if not part:
        print_table(options, entries)
        print(f"written: {write_result(options, bench.description(), entries)}", flush=True)


def claimed(folder: Path, name: str) -> bool:
    """Whether `name` was nobody's yet; it is this process's then."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def measure_in_parallel(options: argparse.Namespace, gpus: int) -> None:
    """One process for each GPU, and their results together."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for index in range(gpus):
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(index)}
            command = [sys.executable, *sys.argv, "--claims", str(Path(folder) / "claims"), "--out", folder]
            processes.append(subprocess.Popen(command, env=environment))
        failed = [process.wait() for process in processes]
        parts = sorted(Path(folder).glob("*.json"))
        if not parts:
            raise SystemExit(f"no process has measured anything; exit codes {failed}")
        description = json.loads(parts[0].read_text())
        entries = known_entries(parts, description)
    description = {key: value for key, value in description.items() if key not in ("command", "rows")}
    path = write_result(options, description | {"gpus": gpus}, entries)
    print_table(options, entries)
    print(f"written: {path}", flush=True)


SAME = ("commit", "model", "texts", "windows", "seq_len", "versions")
"""What results must share to stand in one table."""


def known_entries(paths: list[Path], description: Entry) -> list[Entry]:
    """The measurements of result files, each once."""
    found = {}
    for path in paths:
        result = json.loads(path.read_text())
        other = [key for key in SAME if json.loads(json.dumps(description[key], default=str)) != result[key]]
        if other:
            raise SystemExit(f"{path} does not belong into this table: {', '.join(other)} differ")
        found |= {(row["label"], entry["seed"]): entry for row in result["rows"] for entry in row["seeds"]}
    return [{"label": label, "seed": seed} | entry for (label, seed), entry in found.items()]


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
        tokenizer, start = api.load_tokenizer(folder), start_token(read_config(folder))
        texts = [load_text(spec, "evaluation") for spec in options.text]
        asked = options.seq_len, options.windows, False, start
        windows = {text.name: token_windows(text, tokenizer, *asked) for text in texts}
        calib = load_text(options.calib, "calibration")
        calibration = token_windows(calib, tokenizer, options.seq_len, options.samples, True, start)
        digests = {text.name: text.digest for text in texts} | {f"calibration {calib.name}": calib.digest}
        return Bench(options, device, folder, digests, windows, calibration)

    @property
    def batch(self) -> int:
        tokens = api.EVALUATION_TOKENS.get(torch.device(self.device).type, 2048)
        return max(1, tokens // self.options.seq_len)

    def description(self) -> dict[str, Any]:
        """What was measured, on what, where."""
        options = self.options
        return {
            "commit": options.commit or current_commit(),
            "model": options.model,
            "device": device_name(torch.device(self.device)).lower().replace(" ", "-"),
            "machine": platform.machine(),
            "versions": versions(),
            "texts": self.texts,
            "windows": options.windows,
            "seq_len": options.seq_len,
        }


def measure(run: Run, seed: int, bench: Bench) -> Entry:
    """Quantize and evaluate once; an error is a result too."""
    try:
        return _measure(run, seed, bench)
    except (MxrotError, torch.OutOfMemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _measure(run: Run, seed: int, bench: Bench) -> Entry:
    entry: Entry = {}
    if run.recipe is None:
        model, _ = api.open_model(bench.folder, bench.device)
    else:
        recipe = load_recipe(run.recipe).changed(run.changes)
        windows = None if recipe.is_data_free else bench.calibration
        result = pipeline.quantize(bench.folder, recipe, windows=windows, device=bench.device, seed=seed)
        assert result.model is not None
        model, record = result.model, result.record
        entry |= {"quantize_seconds": record.seconds, "peak_gpu_bytes": record.peak_gpu_bytes}
        entry |= {"recipe_toml": recipe.to_toml(), "calibration_windows": record.windows}
        entry["output_errors"] = output_errors(record)
        if record.tuning is not None:
            entry["tuning"] = [vars(check) for check in record.tuning]
    if not bench.options.no_perplexity:
        entry["perplexity"] = {
            name: vars(perplexity(model, windows, bench.batch)) for name, windows in bench.windows.items()
        }
        if bench.options.reload and run.recipe is not None:
            del model
            entry["reloaded"] = reloaded_perplexity(bench, recipe, seed)
    return entry


def reloaded_perplexity(bench: Bench, recipe: Recipe, seed: int) -> dict[str, float]:
    """Of a checkpoint that is written by a second run with the same seed, and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        quantize_to_folder(
            bench.folder,
            recipe,
            path,
            base_name=bench.options.model,
            windows=None if recipe.is_data_free else bench.calibration,
            data=None,
            device=bench.device,
            seed=seed,
        )
        model, _ = api.open_model(path, bench.device)
        return {name: perplexity(model, windows, bench.batch).ppl for name, windows in bench.windows.items()}


def output_errors(record: RunRecord) -> dict[str, float]:
    """The mean relative output error of the linears of each site."""
    found: dict[str, list[float]] = {}
    for block in record.blocks:
        for linear in block.linears:
            if linear.output_error is not None:
                found.setdefault(linear.site, []).append(linear.output_error)
    return {site: sum(errors) / len(errors) for site, errors in found.items()}


def summary(run: Run, entries: list[Entry], original: dict[str, float] | None = None) -> dict[str, Any]:
    """The row of one run: means over its seeds, and whether they are within bounds.

    `original` is the perplexity of the unquantized model on each text.
    """
    row: dict[str, Any] = {"label": run.label, "recipe": run.recipe, "changes": run.changes, "seeds": entries}
    errors = [entry["error"] for entry in entries if "error" in entry]
    measured = [entry["perplexity"] for entry in entries if "perplexity" in entry]
    if errors:
        row["error"] = errors[0]
    if errors or not measured:
        return row
    means = {name: sum(found[name]["ppl"] for found in measured) / len(measured) for name in measured[0]}
    first = [found[next(iter(means))]["ppl"] for found in measured]
    row |= {"means": means, "spread": max(first) - min(first), "bounds": [run.low, run.high]}
    row["holds"] = run.low <= next(iter(means.values())) <= (math.inf if run.high is None else run.high)
    if original is not None:
        row["relative"] = {name: mean / original[name] for name, mean in means.items()}
        row["relative_bound"] = run.relative
        bound = math.inf if run.relative is None else run.relative
        row["holds"] &= all(value <= bound for value in list(row["relative"].values())[1:])
    reloaded = [(entry["reloaded"], entry["perplexity"]) for entry in entries if "reloaded" in entry]
    if reloaded:
        row["reloads"] = all(
            abs(value - here[name]["ppl"]) < 5e-5 for again, here in reloaded for name, value in again.items()
        )
    return row


def summaries(options: argparse.Namespace, entries: list[Entry]) -> list[dict[str, Any]]:
    """All rows, in the order of the table."""
    by_label: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry["seed"]):
        by_label.setdefault(entry["label"], []).append(entry)
    runs = [run for run in chosen_runs(options) if run.label in by_label]
    unquantized = next((summary(run, by_label[run.label]) for run in runs if run.recipe is None), {})
    return [summary(run, by_label[run.label], unquantized.get("means")) for run in runs]


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    text = f"{row['label']:34s}"
    if "error" in row:
        return f"{text} FAILED: {row['error']}"
    if "means" in row:
        text += "".join(f" {mean:8.3f}" for mean in row["means"].values()) + f"  spread {row['spread']:6.3f}"
    if "relative" in row:
        text += "  x " + " ".join(f"{value:.3f}" for value in row["relative"].values())
    if row.get("bounds", [0.0, None])[1] is not None:
        text += "  {:.2f} to {:.2f}".format(*row["bounds"]) + f"  {'ok' if row['holds'] else 'MISSED':6s}"
    if "reloads" in row:
        text += "  reloads as it was" if row["reloads"] else "  RELOADS AS ANOTHER MODEL"
    seconds = [entry["quantize_seconds"] for entry in row["seeds"] if "quantize_seconds" in entry]
    peaks = [entry["peak_gpu_bytes"] or 0 for entry in row["seeds"] if "peak_gpu_bytes" in entry]
    if seconds:
        text += f"  {' '.join(f'{value:.2f}' for value in seconds)} s, {max(peaks) / 1e9:.2f} GB"
    return text


def print_table(options: argparse.Namespace, entries: list[Entry]) -> None:
    print("\n" + "\n".join(line(row) for row in summaries(options, entries)), flush=True)


def write_result(
    options: argparse.Namespace, description: dict[str, Any], entries: list[Entry], part: str = ""
) -> Path:
    """Write what there is; the file's path."""
    result = {"command": shlex.join(["python", *sys.argv]), **description, "rows": summaries(options, entries)}
    options.out.mkdir(parents=True, exist_ok=True)
    words = [options.model.replace("/", "-"), options.table, description["device"], time.strftime("%Y-%m-%d"), part]
    path = options.out / ("_".join(filter(None, words)) + ".json")
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return path


def current_commit() -> str:
    """The commit that was measured; `unknown` outside of a git checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


if __name__ == "__main__":
    main()
