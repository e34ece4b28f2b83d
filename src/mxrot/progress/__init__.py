"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, int, str], None]
"""Told (done, total, what is being done). `done` has a fraction where a step takes long; a phase of the work begins
where `done` goes back or `total` changes. A phase of one step tells only what it is: (0, 1, "opening the model")."""


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
