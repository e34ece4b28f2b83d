"""Progress of work that takes long.

`mxrot.progress.bar` shows it. Pass the function that it yields as `progress=` to one or more functions of mxrot.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module

Progress = Callable[[float, int, str], None]
"""A function that is called with (done, total, what is being done). `done` can be fractional if a step takes long. A
new phase of the work begins when `done` decreases or `total` changes. A phase of one step calls (0, 1, "opening the
model")."""


def bar(title: str) -> AbstractContextManager[Progress]:
    """Show the progress of several calls under one title, on standard error.

    A terminal shows a bar with the remaining time, and a notebook a bar that is updated in place. A file gets a line
    from time to time.

    Args:
        title: The text in front of the bar.

    Returns:
        A context manager. It yields a function that takes (done, total, what); pass it as `progress=`.

    Example:
        >>> with mxrot.progress.bar("Two recipes") as told:
        ...     for name in ("rtn", "hadamard"):
        ...         model = mxrot.quantize("demo", name, progress=told)
    """
    shown: AbstractContextManager[Progress] = import_module("mxrot.progress.display").progress_on_stderr(title)
    return shown


def silent(done: float, total: int, what: str) -> None:
    """Show nothing."""


class Counted(str):
    """What is being done, with the unit of `done` and `total`, such as "blocks", so that a rate can be shown."""

    unit: str

    def __new__(cls, what: str, unit: str) -> Counted:
        counted = super().__new__(cls, what)
        counted.unit = unit
        return counted


def part_of(progress: Progress, begin: float, size: float, total: int, unit: str = "") -> Progress:
    """The progress of a part of a phase: the part begins at `begin` of `total` and takes `size` of them.

    The part itself may count something else. `unit` names what `total` counts, if a rate is to be shown.
    """

    def told(done: float, of: int, what: str) -> None:
        progress(begin + size * min(1.0, done / max(1, of)), total, Counted(what, unit) if unit else what)

    return told
