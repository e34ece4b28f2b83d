"""Progress of long work, on standard error: a bar with the time to go, or on no terminal a line now and then.

Work has phases, each with its own total. A phase begins where the count goes back or the total changes; the
time to go is that of the phase.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mxrot.progress import Progress

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def progress_on_stderr(title: str) -> Iterator[Progress]:
    """Yields a function to be told (done, total, what)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer(title)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with rich.progress.Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield _bar_mover(bar, title)


def _bar_mover(bar: rich.progress.Progress, title: str) -> Progress:
    task = bar.add_task(title, total=None)
    last = (0.0, 0)

    def told(done: float, total: int, what: str) -> None:
        nonlocal last
        if _is_new_phase(last, (done, total)):
            bar.reset(task, total=total)
        last = (done, total)
        bar.update(task, completed=done, description=f"{title}: {what}" if what else title)

    return told


def _line_printer(title: str) -> Progress:
    """The first call prints, and then the first one after each SECONDS_BETWEEN_LINES."""
    last = (0.0, 0)
    first_done, started, printed = 0.0, 0.0, float("-inf")

    def told(done: float, total: int, what: str) -> None:
        nonlocal last, first_done, started, printed
        now = time.monotonic()
        if _is_new_phase(last, (done, total)):
            first_done, started = done, now
        last = (done, total)
        if now - printed < SECONDS_BETWEEN_LINES:
            return
        printed = now
        made = done - first_done
        left = f", {(now - started) * (total - done) / made:.0f} s to go" if made else ""
        print(f"{title}: {done:.0f} of {total}{f' ({what})' if what else ''}{left}", file=sys.stderr, flush=True)

    return told


def _is_new_phase(last: tuple[float, int], now: tuple[float, int]) -> bool:
    return now[0] < last[0] or now[1] != last[1]
