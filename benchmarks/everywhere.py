"""How far recipes are from the original on several models and texts, after several calibrations.

    python benchmarks/everywhere.py --models demo gemma=FOLDER --texts wikitext=wiki.test.raw code=code.txt \\
        --calibrations wikitext=wiki.train.raw own --recipes duquant++-gptq mxrot \\
        --variant "mxrot, target own" mxrot rounding.target=own --windows 16 --work work

Of each recipe KL(original || quantized) in nats a token, its ratio to that of the recipe `--base` with a standard error
from the same windows of both, perplexity, and how often both have the same most probable token; at the end geometric
means of the ratios, and the largest. Calibrated on `own` means on nothing but windows that the model writes itself. A
text that is calibrated on is refused as one to measure on.

One task is one recipe with one seed on one model after one calibration. Processes, one for each GPU or `--processes`,
take tasks from one queue; one that fails is told and stops nothing else. What is finished is a line in `--work`, and
the same command, or one that asks for more, goes on from there; what was measured with other code of mxrot is measured
again. Prints a line for each task, the tables last, and writes them as JSON, which `benchmarks/markdown.py` prints.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import current_commit
from everywhere_plan import Job, Plan, code_digest, make_plan
from everywhere_rows import row_of, summaries
from everywhere_tables import terminal
from task_queue import Answer, Slot, Task, TaskQueue

from mxrot import api
from mxrot.checkpoint.lock import held
from mxrot.environment import device_name, versions
from mxrot.errors import MxrotError

Entry = dict[str, Any]


def main() -> None:
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    # So that processes end with this one.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with (
            held(options.work / "lock", options.work),
            tempfile.TemporaryDirectory(prefix="mxrot-") as place,
        ):
            failed = measure_everything(options, Path(place))
    except MxrotError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, previous)
    raise SystemExit(1 if failed else 0)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["demo"], help="[NAME=]folder, or demo")
    parser.add_argument("--texts", nargs="+", default=["demo"], help="NAME=FILE to measure on")
    parser.add_argument("--calibrations", nargs="+", default=["demo"], help="NAME=FILE, or own: the model writes it")
    parser.add_argument("--recipes", nargs="*", default=[], help="names or TOML files")
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar="WORD", help="NAME RECIPE KEY=VALUE ..."
    )
    parser.add_argument("--base", default="duquant++-gptq", help="what ratios are to; measured in any case")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=None, help="of each text, evenly spaced (all)")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens a window")
    parser.add_argument("--calib-seq-len", type=int, default=None, help="the same of calibration (--seq-len)")
    parser.add_argument("--device", default=None)
    parser.add_argument("--processes", type=int, default=1, help="at once on each GPU, or on the CPU")
    parser.add_argument("--work", type=Path, default=Path("work/everywhere"), help="finished tasks, kept")
    parser.add_argument("--any-code", action="store_true", help="take finished tasks of other code of mxrot, too")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which no task is begun")
    parser.add_argument("--commit", default=None, help="what is measured, where there is no git checkout")
    parser.add_argument("--name", default="everywhere", help="of the file that is written")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def measure_everything(options: argparse.Namespace, place: Path) -> bool:
    """Measure what is not finished, and print and write everything; whether something failed."""
    started = time.monotonic()
    device = torch.device(options.device or api.default_device())
    plan = make_plan(options, place, device)
    finished = Finished(options.work / "finished.jsonl", None if options.any_code else code_digest())
    entries = {job: entry for job in plan.jobs if (entry := finished.find(job.key)) is not None}
    left = [job for job in plan.jobs if job not in entries]
    tasks = plan.tasks(left)
    if entries:
        print(f"{len(entries)} of {len(plan.jobs)} were finished before, and are taken from {options.work}", flush=True)
    reasons: dict[Job, str] = {}
    by_name = {job.name: job for job in left}

    def answered(task: Task, answer: Answer, seconds: float) -> None:
        job = by_name.get(task.name)
        if job is not None and "error" in answer:
            reasons[job] = answer["error"]
        elif job is not None:
            entries[job] = answer
            finished.keep(job.key, answer)
        at = f"[{len(entries) + len(reasons)}/{len(plan.jobs)}, {time.monotonic() - started:.0f} s]"
        print(f"{at} {task.name}: {said(answer, seconds)}", flush=True)

    queue = TaskQueue(tasks, answered, options.stop_after - (time.monotonic() - started))
    unbegun = [task for task in queue.run(slots(options, device)) if task.name in by_name]
    rows = all_rows(plan, entries, reasons)
    if rows:
        print("\n" + terminal(rows, plan.base), flush=True)
        path = write_result(options, plan, device, rows, time.monotonic() - started)
        print(f"\nwritten: {path}", flush=True)
    if unbegun:
        print(f"{len(unbegun)} left after {options.stop_after:.0f} s; the same command goes on with them", flush=True)
    for job, reason in reasons.items():
        print(f"FAILED {job.name}: {reason}", flush=True)
    return bool(reasons or plan.refused)


def said(answer: Answer, seconds: float) -> str:
    """A task's answer in a line."""
    if "error" in answer:
        return f"FAILED: {answer['error']}"
    if "texts" not in answer:
        return f"done in {seconds:.1f} s"
    means = {text: sum(found["kl"]) / len(found["kl"]) for text, found in answer["texts"].items()}
    figures = ", ".join(f"{text} {value:.4f}" for text, value in means.items())
    return f"KL {figures}; {answer['seconds']:.1f} s to quantize, {seconds:.1f} in all"


class Finished:
    """A file with a line for each task that is done; one process writes it, and a line that was cut off counts for
    nothing."""

    def __init__(self, path: Path, code: str | None) -> None:
        self._path, self._code = path, code
        self._found: dict[str, Entry] = {}
        whole = path.read_bytes() if path.exists() else b""
        self._is_cut = bool(whole) and not whole.endswith(b"\n")
        for line in whole.splitlines():
            try:
                kept = json.loads(line)
                if code is None or kept["code"] == code:
                    self._found[kept["key"]] = kept["entry"]
            except (ValueError, KeyError, TypeError):
                continue

    def find(self, key: str) -> Entry | None:
        return self._found.get(key)

    def keep(self, key: str, entry: Entry) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            line = json.dumps({"key": key, "code": self._code or code_digest(), "entry": entry})
            file.write(("\n" if self._is_cut else "") + line + "\n")
        self._is_cut = False


def slots(options: argparse.Namespace, device: torch.device) -> list[Slot]:
    """One for each process; on a GPU it sees no other."""
    command = (sys.executable, str(Path(__file__).with_name("everywhere_worker.py")))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(index) for index in range(torch.cuda.device_count())]
    chosen: list[str | None] = [None]
    if device.type == "cuda":
        chosen = [*names] if device.index is None else [names[device.index]]
    count = len(chosen) * options.processes
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))}
    places: list[dict[str, str]] = [{} if name is None else {"CUDA_VISIBLE_DEVICES": name} for name in chosen]
    return [Slot(command, threads | each) for _ in range(options.processes) for each in places]


def all_rows(plan: Plan, entries: dict[Job, Entry], reasons: dict[Job, str]) -> list[Entry]:
    """A row for each model, calibration and recipe of which something is known, in the order they were asked for."""
    runs: dict[tuple[str, str, str], dict[int, Entry]] = {}
    for job, entry in entries.items():
        for calibration in job.calibrations:
            runs.setdefault((job.model, calibration, job.recipe), {})[job.seed] = entry
    failed = {(job.model, name, job.recipe): reason for job, reason in reasons.items() for name in job.calibrations}
    rows = []
    for labels in plan.labels():
        named = dict(zip(("model", "calibration", "recipe"), labels, strict=True))
        reason = plan.refused.get((labels[0], labels[2])) or failed.get(labels)
        if labels in runs:
            rows.append(row_of(named, runs[labels], runs.get((*labels[:2], plan.base), {})))
        elif reason is not None:
            rows.append(named | {"error": reason})
    return rows


def write_result(
    options: argparse.Namespace, plan: Plan, device: torch.device, rows: list[Entry], seconds: float
) -> Path:
    """Write what there is; the file's path."""
    name = device_name(device).lower().replace(" ", "-")
    asked = ("base", "seeds", "windows", "samples", "seq_len", "calib_seq_len", "processes")
    result = {
        "kind": "everywhere",
        "command": shlex.join(["python", *sys.argv]),
        "commit": options.commit or current_commit(),
        "code": code_digest(),
        "device": name,
        "gpus": torch.cuda.device_count() if device.type == "cuda" else 0,
        "machine": platform.machine(),
        "versions": versions(),
        "seconds": round(seconds, 1),
        **{key: getattr(options, key) for key in asked},
        **plan.description,
        "rows": rows,
        "summaries": summaries(rows, plan.base),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}_{name}_{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
