"""Tasks that several processes take from one queue.

A process is asked one task at a time, a line of JSON each way, on its standard input and output. A task is begun when
all that it needs are done. One that fails, or whose process dies, is an answer like any other: what needs it fails
too, everything else goes on, and a process that has died is replaced.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

Answer = dict[str, Any]
"""What a process says of a task; `error` in words where it failed, `ends` where the process should not go on."""


@dataclass(frozen=True)
class Task:
    """One thing to do."""

    name: str
    what: dict[str, Any]
    """What the process is told."""
    needs: tuple[str, ...] = ()
    """Names of tasks that must be done before; of those that are not in the queue nothing is waited for."""


@dataclass(frozen=True)
class Slot:
    """Where one process at a time runs."""

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """Beside that of this process."""


class Process:
    """One that answers."""

    def __init__(self, slot: Slot) -> None:
        self._process = subprocess.Popen(
            slot.command, env=os.environ | slot.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: dict[str, Any]) -> Answer:
        """Its answer, or how it died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            if line:
                return dict(json.loads(line))
        except (BrokenPipeError, ValueError):
            self._process.kill()
        return {"error": f"the process ended with code {self._process.wait()}", "ends": True}

    def end(self) -> None:
        """At once; a task that it is at is lost."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


class TaskQueue:
    """Tasks, and who has them; `run` does them all."""

    def __init__(
        self, tasks: Iterable[Task], answered: Callable[[Task, Answer, float], None], stop_after: float
    ) -> None:
        """`answered` is told of each task with its answer and seconds, never twice at once. After `stop_after` seconds
        nothing more is begun."""
        self._waiting = list(tasks)
        self._answered = answered
        self._open = {task.name for task in self._waiting}
        self._change = threading.Condition()
        self._end = time.monotonic() + stop_after
        self._processes: dict[int, Process] = {}
        self._broken: list[Exception] = []

    def run(self, slots: Sequence[Slot]) -> list[Task]:
        """Do the tasks in these slots; those that were not begun."""
        threads = [threading.Thread(target=self._serve, args=each, daemon=True) for each in enumerate(slots)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            with self._change:
                self._end = -math.inf
                for process in self._processes.values():
                    process.end()
        if self._broken:
            raise self._broken[0]
        return self._waiting

    def _serve(self, number: int, slot: Slot) -> None:
        """What one slot does; an error here is none of a task, and ends everything."""
        try:
            self._do_tasks(number, slot)
        except Exception as error:
            with self._change:
                self._broken.append(error)
                self._end = -math.inf
                self._change.notify_all()

    def _do_tasks(self, number: int, slot: Slot) -> None:
        while (task := self._next()) is not None:
            started = time.monotonic()
            with self._change:
                if number not in self._processes:
                    self._processes[number] = Process(slot)
                process = self._processes[number]
            answer = process.ask(task.what)
            if answer.get("ends"):
                with self._change:
                    self._processes.pop(number).end()
            self._finish(task, answer, time.monotonic() - started)

    def _next(self) -> Task | None:
        """One that can be begun, waiting for it if need be; None where there is none any more."""
        with self._change:
            while self._waiting and time.monotonic() < self._end:
                for task in self._waiting:
                    if not self._open.intersection(task.needs):
                        self._waiting.remove(task)
                        return task
                self._change.wait(timeout=1.0)
        return None

    def _finish(self, task: Task, answer: Answer, seconds: float) -> None:
        with self._change:
            if self._end > -math.inf:  # else its process was ended with everything
                self._settle(task, answer, seconds)
                self._change.notify_all()

    def _settle(self, task: Task, answer: Answer, seconds: float) -> None:
        """Note the answer; what needs a failed task has failed."""
        self._open.discard(task.name)
        self._answered(task, answer, seconds)
        if "error" not in answer:
            return
        for other in [other for other in self._waiting if task.name in other.needs]:
            self._waiting.remove(other)
            self._settle(other, {"error": f"needs {task.name}, which failed: {answer['error']}"}, 0.0)
