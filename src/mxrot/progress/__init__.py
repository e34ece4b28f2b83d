"""How long work tells how far it is.

`mxrot.progress.bar` shows it: pass what it yields as `progress=` to as many functions as you like.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module

Progress = Callable[[float, int, str], None]
"""Told (done, total, what is being done). `done` has a fraction where a step takes long; a phase of the work begins
where `done` goes back or `total` changes. A phase of one step tells only what it is: (0, 1, "opening the model")."""


def bar(title: str) -> AbstractContextManager[Progress]:
    """Show progress on standard error: a bar with the time to go in a terminal, a bar that changes in a notebook, a
    line now and then in a file.

    Args:
        title: What is done, in front of the bar.

    Returns:
        A context manager. It yields a function to be told (done, total, what), which is what `progress=` takes.

    Example:
        >>> with mxrot.progress.bar("Two recipes") as told:
        ...     for name in ("rtn", "hadamard"):
        ...         model = mxrot.quantize("demo", name, progress=told)
    """
    shown: AbstractContextManager[Progress] = import_module("mxrot.progress.display").progress_on_stderr(title)
    return shown


def silent(done: float, total: int, what: str) -> None:
    """A progress that tells nobody."""


class Counted(str):
    """What is being done, and what `done` and `total` count, as in "blocks": a rate can be said of it."""

    unit: str

    def __new__(cls, what: str, unit: str) -> Counted:
        counted = super().__new__(cls, what)
        counted.unit = unit
        return counted


def part_of(progress: Progress, begin: float, size: float, total: int, unit: str = "") -> Progress:
    """What a part of a phase tells: it begins at `begin` of `total` and takes `size` of them, whatever it counts.

    `unit` names what `total` counts, where a rate of it means something.
    """

    def told(done: float, of: int, what: str) -> None:
        progress(begin + size * min(1.0, done / max(1, of)), total, Counted(what, unit) if unit else what)

    return told
