"""Progress of long work, on standard error: a bar with the time to go, or on no terminal a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0
Told = Callable[[int, int, str], None]


@contextmanager
def progress_on_stderr(title: str) -> Iterator[Told]:
    """Yields a function to be told (done, total, what)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def told(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title}: {what}" if what else title)

        yield told


def _line_printer(title: str) -> Told:
    started = last = time.monotonic()

    def told(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        left = f", {(now - started) * (total - done) / done:.0f} s to go" if done else ""
        print(f"{title}: {done} of {total} ({what}){left}", file=sys.stderr, flush=True)

    return told
