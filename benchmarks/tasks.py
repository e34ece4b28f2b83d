"""Scores of recipes in tasks of lm-evaluation-harness, each with its standard error.

    python benchmarks/tasks.py --data DIR --calib wiki.train.raw --work work --out benchmarks/results

Quantizes the model with each recipe into a checkpoint in the folder `--work`, scores what loading that gives, prints a
line a row as it ends and a table in Markdown last, and writes JSON with what a run needs to be done again. Checkpoints
and answers in `--work` are taken up again, so a run that was interrupted goes on when the same command is given;
`--known` takes rows from result files of the same commit. `--merge` puts result files of several seeds into one, whose
answers are means over seeds, and measures nothing. Without `--data` the tasks' data are those of the hub.

A model's mean is that over tasks, and its recovery that mean relative to the unquantized model's. The standard error of
a recovery is that of paired examples: both models have answered the same ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy import current_commit

from mxrot import api
from mxrot.environment import device_name, versions
from mxrot.evaluation import TaskScore, load_tasks, mean_score, recovery, score_tasks, standard_error
from mxrot.models import find_model
from mxrot.recipe import load_recipe
from mxrot.report import progress_on_stderr

SIX = "arc_easy,hellaswag,piqa,winogrande,openbookqa,lambada_openai"
SAME = ("commit", "model", "calib", "samples", "seq_len", "seed", "limit", "device", "versions")
"""What results must share to stand in one table."""

Scores = dict[str, TaskScore]
Entry = dict[str, Any]
"""What one row has given; its scores under "tasks", as `--json` of `mxrot eval` has them, with the hits."""


@dataclass(frozen=True)
class Row:
    """A recipe, or the model as it is."""

    label: str
    recipe: str | None
    least: float | None = None
    """Bound of its recovery."""


ROWS = (
    Row("FP16", None),
    Row("rtn", "rtn"),
    Row("duquant++-gptq", "duquant++-gptq"),
    Row("mxrot", "mxrot", least=0.95),
    Row("mxrot-light", "mxrot-light", least=0.96),
    Row("mxrot-tuned", "mxrot-tuned", least=0.97),
)


def main() -> None:
    options = parse_options()
    if options.merge:
        description, entries = merged([json.loads(path.read_text(encoding="utf-8")) for path in options.merge])
        print(table(list(ROWS), entries), flush=True)
        print(f"\nwritten: {write_result(options, description, entries)}", flush=True)
        return
    started = time.monotonic()
    description = describe(options)
    entries = known_entries(options.known, description)
    tasks = load_tasks(options.tasks.split(","), options.data)
    for row in chosen_rows(options):
        if set(entries.get(row.label, {}).get("tasks", {})) == set(tasks):
            continue
        if time.monotonic() - started > options.stop_after:
            print(f"stopped after {options.stop_after:.0f} s", flush=True)
            break
        with progress_on_stderr(row.label) as told:
            entries[row.label] = measure(row, tasks, options, told)
        write_result(options, description, entries)
        print(" | ".join(cells(row, entries)), flush=True)
    print("\n" + table(chosen_rows(options), entries), flush=True)
    print(f"\nwritten: {write_result(options, description, entries)}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tasks", default=SIX)
    parser.add_argument("--data", type=Path, default=None, help="folder with the tasks' data (the hub)")
    parser.add_argument("--limit", type=int, default=None, help="only the first examples of each task")
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--only", default="", help="only rows whose label is one of these, separated by |")
    parser.add_argument("--calib", default="demo")
    parser.add_argument("--samples", type=int, default=None, help="calibration windows (the recipe's)")
    parser.add_argument("--seq-len", type=int, default=None, help="tokens a calibration window (the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--work", type=Path, default=Path("work"), help="checkpoints and answers, kept")
    parser.add_argument("--known", type=Path, nargs="+", default=[], help="results that need not be measured again")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="results that differ in their seeds alone")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which no row is begun")
    parser.add_argument("--commit", default=None, help="what is measured, where there is no git checkout")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """The rows that were asked for."""
    return [row for row in ROWS if not options.only or row.label in options.only.split("|")]


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, on what, where."""
    asked = {key: getattr(options, key) for key in ("model", "calib", "samples", "seq_len", "seed", "limit")}
    return asked | {
        "commit": options.commit or current_commit(),
        "device": device_name(torch.device(options.device or api.default_device())).lower().replace(" ", "-"),
        "machine": platform.machine(),
        "versions": versions(tasks=True),
    }


def known_entries(paths: list[Path], description: dict[str, Any]) -> dict[str, Entry]:
    """The rows of result files, by their labels."""
    found: dict[str, Entry] = {}
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key in SAME if description[key] != result[key]]
        if other:
            raise SystemExit(f"{path} does not belong into this table: {', '.join(other)} differ")
        found |= {entry["label"]: entry for entry in result["rows"]}
    return found


def measure(row: Row, tasks: dict[str, Any], options: argparse.Namespace, told: api.Progress) -> Entry:
    """Quantize, load and score; what `--work` has of it is not done again."""
    options.work.mkdir(parents=True, exist_ok=True)
    entry: Entry = {"label": row.label, "recipe": row.recipe}
    if row.recipe is None:
        folder = find_model(options.model)
    else:
        folder = options.work / row.label
        run = api.quantize(
            options.model,
            row.recipe,
            folder,
            calib=options.calib,
            samples=options.samples,
            seq_len=options.seq_len,
            seed=options.seed,
            device=options.device,
            resume=True,
            progress=told,
        )
        assert isinstance(run, dict)
        entry |= {"quantize_seconds": run["seconds"], "peak_gpu_bytes": run["peak_gpu_bytes"], "data": run["data"]}
        entry["recipe_toml"] = load_recipe(row.recipe).to_toml()
    model, _ = api.open_model(folder, options.device)
    tokenizer = api.load_tokenizer(folder)
    started = time.monotonic()
    limits: dict[str, Any] = {"limit": options.limit, "batch_size": options.batch_size}
    with api.kept_answers(options.work / f"{row.label}.answers", model, folder, resume=True) as answers:
        scores = score_tasks(model, tokenizer, tasks, answers=answers, progress=told, **limits)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return entry | {
        "seconds": time.monotonic() - started,
        "tasks": {name: pack(found) for name, found in scores.items()},
    }


def pack(score: TaskScore) -> dict[str, Any]:
    """A score as JSON takes it, the hits of a metric as the hexadecimal digits of its bits."""
    bits = {metric: "".join(str(int(hit)) for hit in hits) for metric, hits in score.hits.items()}
    return score.as_table() | {"hits": {metric: f"{int(text, 2):x}" for metric, text in bits.items()}}


def unpack(found: dict[str, Any]) -> TaskScore:
    """The score of `pack`."""
    bits = {metric: f"{int(digits, 16):0{found['n']}b}" for metric, digits in found["hits"].items()}
    hits = {metric: tuple(float(bit) for bit in text) for metric, text in bits.items()}
    return TaskScore(hits, found["split"], found["sha256"])


def scores_of(entry: Entry) -> Scores:
    """What a row has scored; each answer a mean over its seeds."""
    if "seeds" not in entry:
        return {name: unpack(found) for name, found in entry["tasks"].items()}
    scores = [scores_of(one) for one in entry["seeds"]]
    return {name: mean_score([each[name] for each in scores]) for name in scores[0]}


def merged(results: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """What results of several seeds have in common, and their rows; those without a recipe need one seed."""
    first = results[0]
    for result in results[1:]:
        if other := [key for key in SAME if key != "seed" and result[key] != first[key]]:
            raise SystemExit(f"results of seeds {first['seed']} and {result['seed']} differ in {', '.join(other)}")
    seeds = [result["seed"] for result in results]
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"two results are of one seed: {' '.join(map(str, seeds))}")
    found: dict[str, list[Entry]] = {}
    for result in results:
        for entry in result["rows"]:
            found.setdefault(entry["label"], []).append({"seed": result["seed"], **entry})
    entries: dict[str, Entry] = {}
    for label, runs in found.items():
        if runs[0]["recipe"] is None or len(runs) == 1:
            entries[label] = runs[0]
        else:
            seconds = sum(run["seconds"] for run in runs) / len(runs)
            entries[label] = {"label": label, "recipe": runs[0]["recipe"], "seconds": seconds, "seeds": runs}
    commands = [result["command"] for result in results]
    description = {key: first[key] for key in (*SAME, "machine")} | {"seed": seeds, "commands": commands}
    return description, entries


def table(rows: list[Row], entries: dict[str, Entry]) -> str:
    """Markdown, one line a row that has been measured."""
    measured = [row for row in rows if row.label in entries]
    if not measured:
        return "nothing measured"
    scores = scores_of(entries[measured[0].label])
    heads = ["", *(f"{name}, {score.best}" for name, score in scores.items())]
    heads += ["mean acc", "recovered", "mean with acc_norm", "recovered", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells(row, entries)) + " |" for row in measured])


def cells(row: Row, entries: dict[str, Entry]) -> list[str]:
    """Percent with standard errors; recoveries where the unquantized model has been measured."""
    scores = scores_of(entries[row.label])
    found = [row.label]
    for score in scores.values():
        hits = score.hits[score.best]
        found.append(percent(sum(hits) / len(hits), standard_error(hits)))
    first = next(other.label for other in ROWS if other.recipe is None)
    original = scores_of(entries[first]) if first in entries else None
    for normed in (False, True):
        mean = recovery(scores, original or scores, normed)
        found.append(percent(mean.mean, mean.error))
        recovered = "" if original is None or row.recipe is None else percent(mean.relative, mean.relative_error)
        if recovered and row.least is not None:
            recovered += " ok" if mean.relative >= row.least else " MISSED"
        found.append(recovered)
    return [*found, f"{entries[row.label]['seconds']:.0f}"]


def percent(value: float, error: float | None) -> str:
    """With its standard error, where there is one."""
    return f"{100 * value:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def write_result(options: argparse.Namespace, description: dict[str, Any], entries: dict[str, Entry]) -> Path:
    """Write what there is; the file's path."""
    ordered = [entries[row.label] for row in ROWS if row.label in entries]
    result = {"command": shlex.join(["python", *sys.argv]), **description, "rows": ordered}
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = "tasks" if isinstance(description["seed"], list) else f"tasks-seed-{description['seed']}"
    words = [Path(description["model"]).name, seeds, description["device"], time.strftime("%Y-%m-%d")]
    path = options.out / ("_".join(words) + ".json")
    path.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
