"""The display of progress on standard error: a bar with the remaining time on a terminal, a line from time to time
elsewhere, and a bar that is updated in place in a notebook.

Work has phases, each with its own total. A phase begins when the count decreases or the total changes. The remaining
time is that of the phase. Work without reports for a while, such as the opening of a model, still shows that it goes
on.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import rich.progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from mxrot.progress import Counted, Progress, silent
from mxrot.progress.pace import Pace, duration

SECONDS_BETWEEN_LINES = 5.0
SHARE_BETWEEN_LINES = 0.05
"""A share of the elapsed time, so that the log of hours has hundreds of lines and not thousands."""
MOST_BETWEEN_LINES = 60.0
HEARTBEAT_SECONDS = 60.0
"""The least time between two lines of work that can last a day."""
SECONDS_BETWEEN_CHANGES = 0.5
"""The time between updates of a line in a notebook."""
BAR_WIDTH = 20
"""The width of a bar, in characters."""

Place = Literal["terminal", "notebook", "file"]
ProgressOption = Progress | bool | None
"""The type of the argument `progress`: a function to call, True to show progress on standard error, False for silence.
None shows it only in interactive use: in a notebook or at Python's prompt, and not in a script."""


@contextmanager
def shown_progress(progress: ProgressOption, title: str) -> Iterator[Progress]:
    """Yields the progress function for a ProgressOption."""
    if callable(progress):
        yield progress
    elif progress or (progress is None and _is_watched()):
        with progress_on_stderr(title) as told:
            yield told
    else:
        yield silent


@contextmanager
def progress_on_stderr(title: str, task: str = "", between: float | None = None) -> Iterator[Progress]:
    """Yields a function that takes (done, total, what).

    `task` describes the work. It is printed as a line of its own with the first report, so that work refused before
    gives one line, the error. Elsewhere than on a terminal there are at least `between` seconds between two lines, or
    SECONDS_BETWEEN_LINES.
    """
    place = _place()
    if place == "terminal":
        with _bar(Console(stderr=True), title, task) as told:
            yield told
        return
    lines = _Lines(title, task, place, SECONDS_BETWEEN_LINES if between is None else between)
    try:
        yield lines.told
        lines.finish()
    finally:
        lines.end()


@contextmanager
def _bar(console: Console, title: str, task: str) -> Iterator[Progress]:
    """A bar that disappears at the end."""
    pace = Pace(time.monotonic())
    columns = (
        rich.progress.TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
        ),
        rich.progress.BarColumn(bar_width=BAR_WIDTH),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        _TimeToGo(pace),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        yield _bar_mover(bar, title, pace, task)


class _TimeToGo(rich.progress.ProgressColumn):
    """The remaining time. rich's own column forgets progress older than half a minute, but blocks can take minutes."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: rich.progress.Task) -> Text:
        left = self._pace.seconds_to_go(time.monotonic())
        return Text("" if left is None else f"{duration(left)} to go", style="progress.remaining")


def _bar_mover(bar: rich.progress.Progress, title: str, pace: Pace, task: str = "") -> Progress:
    number = bar.add_task(title, total=None)

    def told(done: float, total: int, what: str) -> None:
        nonlocal task
        if task:
            wrapper = textwrap.TextWrapper(bar.console.width, subsequent_indent="  ")
            wrapper.break_long_words = wrapper.break_on_hyphens = False  # paths stay in one piece
            lines = wrapper.fill(f"{title}: {task}")
            bar.console.print(lines, markup=False, highlight=False, soft_wrap=True)
            task = ""
        begun = pace.begun
        pace.tell(time.monotonic(), done, total, what)
        if pace.begun != begun:
            bar.reset(number)
        bar.tasks[0].total = None if pace.is_one_step else total
        bar.update(number, completed=done, description=f"{title}: {what}" if what else title)

    return told


class _Lines:
    """Prints a line for reports, and from time to time without them."""

    def __init__(self, title: str, task: str, place: Place, between: float) -> None:
        self._title, self._task, self._in_place, self._between = title, task, place == "notebook", between
        self._started = time.monotonic()
        self._pace = Pace(self._started)
        self._printed = float("-inf")
        self._under_cell: Any = None  # IPython's handle of the line in a notebook
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._go_on, daemon=True).start()

    def told(self, done: float, total: int, what: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._pace.tell(now, done, total, what)
            self._print(now, is_told=True)

    def finish(self) -> None:
        """In a notebook, let the last line show a full bar."""
        with self._lock:
            if self._under_cell is not None:
                pace, passed = self._pace, duration(time.monotonic() - self._started)
                counted = "" if pace.is_one_step else f" {pace.total} of {pace.total}"
                self._show(f"{self._title}: {_drawn(1.0)}{counted}, {passed}")

    def end(self) -> None:
        self._ended.set()

    def _show(self, line: str) -> None:
        """Show the line under the cell in place of the one before. A stored notebook then holds the last one alone."""
        if self._under_cell is None:
            display = importlib.import_module("IPython.display").display
            self._under_cell = display({"text/plain": line}, raw=True, display_id=True)
        else:
            self._under_cell.update({"text/plain": line}, raw=True)

    def _go_on(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_CHANGES if self._in_place else SECONDS_BETWEEN_LINES):
            with self._lock:
                if not self._ended.is_set():
                    self._print(time.monotonic())

    def _print(self, now: float, is_told: bool = False) -> None:
        # An opening that ends at once, possibly with an error, needs no line.
        is_quick = is_told and self._pace.is_one_step and now - self._started < SECONDS_BETWEEN_LINES
        if is_quick or now - self._printed < self._gap(now):
            return
        self._printed = now
        if self._task:
            print(f"{self._title}: {self._task}", file=sys.stderr)
            self._task = ""
        line = self._line(now, is_told)
        if self._in_place:
            self._show(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def _gap(self, now: float) -> float:
        if self._in_place:
            return SECONDS_BETWEEN_CHANGES
        longer = min(MOST_BETWEEN_LINES, SHARE_BETWEEN_LINES * (now - self._started))
        return max(self._between, longer)

    def _line(self, now: float, is_told: bool) -> str:
        pace = self._pace
        passed = "" if is_told else f", {duration(now - self._started)} so far"
        if pace.is_one_step:
            return f"{self._title}: {pace.what or 'starting'}{passed}"
        left = pace.seconds_to_go(now)
        to_go = passed if left is None else f", {duration(left)} to go"
        what = f" ({pace.what})" if pace.what else ""
        drawn = f"{_drawn(pace.done / pace.total)} " if self._in_place else ""
        return f"{self._title}: {drawn}{int(pace.done + 1e-6)} of {pace.total}{what}{self._rate(now)}{to_go}"

    def _rate(self, now: float) -> str:
        """The rate of the counted unit, if it has a name."""
        what = self._pace.what
        rate = self._pace.an_hour(now) if isinstance(what, Counted) else None
        if rate is None or not isinstance(what, Counted):
            return ""
        return f", {rate:{'.0f' if rate >= 100 else '.3g'}} {what.unit} an hour"


def _drawn(share: float) -> str:
    """A bar of BAR_WIDTH characters."""
    full = int(BAR_WIDTH * min(1.0, share) + 1e-6)
    return "█" * full + "░" * (BAR_WIDTH - full)


def _place() -> Place:
    """The kind of output that standard error goes to."""
    if _is_notebook():
        return "notebook"
    console = Console(stderr=True)
    # With FORCE_COLOR, rich calls any output a terminal. On a dumb one it draws nothing.
    is_live = console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty()
    return "terminal" if is_live else "file"


def _is_notebook() -> bool:
    """True in a kernel of IPython, which shows output under the cell."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _is_watched() -> bool:
    return _is_notebook() or (hasattr(sys, "ps1") and sys.stderr.isatty())
