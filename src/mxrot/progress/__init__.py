"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, int, str], None]
"""Told (done, total, what is being done). `done` has a fraction where a step takes long; a phase of the work begins
where `done` goes back or `total` changes. A phase of one step tells only what it is: (0, 1, "opening the model")."""


def silent(done: float, total: int, what: str) -> None:
    """A progress that tells nobody."""


def part_of(progress: Progress, begin: float, size: float, total: int) -> Progress:
    """What a part of a phase tells: it begins at `begin` of `total` and takes `size` of them, whatever it counts."""

    def told(done: float, of: int, what: str) -> None:
        progress(begin + size * min(1.0, done / max(1, of)), total, what)

    return told
