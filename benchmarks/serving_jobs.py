"""Processes of benchmarks/serving.py, one for each engine: one after the other, or all at once, taking turns.

Starting an engine takes much longer than measuring it. Together they start at once; perplexities, which nothing
disturbs, are measured as soon as an engine is ready, and speeds in turns, when nothing else is running.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_OFTEN = 0.1
"""Seconds between two looks at what the processes have done."""


@dataclass
class Job:
    """One process."""

    way: str
    kind: str
    """`speed` waits for its turn; others do not."""
    script: str
    task: dict[str, Any]
    plugins: str = ""
    ended: str | None = None
    """Why it was ended; None if it was not."""
    process: subprocess.Popen[bytes] | None = None
    is_over: bool = False
    """Was it ended, or seen to have ended? Its group may be another one's since."""

    @property
    def name(self) -> str:
        return re.sub(r"[^\w]+", "-", f"{self.way} {self.kind}")

    def start(self, folder: Path, log: Path, waits: bool) -> None:
        """In a process group of its own, with its files in `folder`."""
        self.result, self.go = folder / f"{self.name}.json", folder / f"{self.name}.go"
        asked = folder / f"{self.name}.task"
        task = self.task | {"result": str(self.result), "go": str(self.go) if waits else None}
        asked.write_text(json.dumps(task), encoding="utf-8")
        single = "1" if task["options"].get("tensor_parallel_size", 1) > 1 else "0"
        own = {"VLLM_PLUGINS": self.plugins, "VLLM_ENABLE_V1_MULTIPROCESSING": single}
        with log.open("w", encoding="utf-8") as said:
            command = [sys.executable, str(HERE / self.script), str(asked)]
            self.process = subprocess.Popen(
                command, env=os.environ | ENVIRONMENT | own, stdout=said, stderr=said, start_new_session=True
            )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Does its engine run, and wait?"""
        return "start_seconds" in self.found()

    def found(self) -> dict[str, Any]:
        """What it has measured so far; with an error if it has ended before it was done."""
        if self.process is None:
            return {}
        found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8")) if self.result.exists() else {}
        if self.is_running or found.get("is_done") or "error" in found:
            return found
        return found | {"error": f"ended {self.ended or 'without a result'}"}

    def end(self, why: str | None = None) -> None:
        """Stop it and all that it has started."""
        if self.process is None or self.is_over:
            return
        if self.is_running and why is not None:
            self.ended = why
        with suppress(ProcessLookupError):  # it has ended, with all its children
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.is_over = True


@dataclass(frozen=True)
class Limits:
    """Seconds."""

    job: float
    """For one job; together with others, for its start, and for its turn."""
    all: float
    """For all jobs; what is not done by then is ended."""


class Crew:
    """Jobs that are run; `told` is called whenever one has ended."""

    def __init__(self, jobs: Sequence[Job], limits: Limits, folder: Path, log_of: Callable[[Job], Path]) -> None:
        self.jobs, self.limits, self.folder, self.log_of = jobs, limits, folder, log_of
        self.told: Callable[[Job], None] = lambda job: None
        self.started = time.monotonic()

    def run(self, together: bool) -> None:
        """All of them, whatever becomes of one."""
        try:
            (self._together if together else self._one_by_one)()
        finally:
            for job in self.jobs:
                job.end("before its turn")

    @property
    def _left(self) -> float:
        return self.limits.all - (time.monotonic() - self.started)

    def _start(self, job: Job, waits: bool) -> None:
        job.start(self.folder, self.log_of(job), waits)

    def _one_by_one(self) -> None:
        for job in self.jobs:
            if self._left > 0:
                self._start(job, waits=False)
                self._wait([job], lambda job: not job.is_running)

    def _together(self) -> None:
        for job in self.jobs:
            self._start(job, waits=job.kind == "speed")
        speed = [job for job in self.jobs if job.kind == "speed"]
        self._wait(self.jobs, lambda job: not job.is_running or (job in speed and job.is_ready))
        for job in speed:
            if job.is_running:
                job.go.write_text("", encoding="utf-8")
                self._wait([job], lambda job: not job.is_running)

    def _wait(self, jobs: Sequence[Job], is_fine: Callable[[Job], bool]) -> None:
        """Until all are fine, or the time is over; then those that are not are ended."""
        seconds = min(self.limits.job, max(self._left, 0))
        begun = time.monotonic()
        open_jobs = list(jobs)
        while open_jobs and time.monotonic() - begun < seconds:
            time.sleep(_OFTEN)
            for job in [job for job in open_jobs if is_fine(job)]:
                open_jobs.remove(job)
                if not job.is_running:
                    self._finish(job)
        for job in open_jobs:
            job.end(f"after {seconds:.0f} s")
            self._finish(job)

    def _finish(self, job: Job) -> None:
        job.end()
        self.told(job)
