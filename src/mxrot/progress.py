"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, int, str], None]
"""Told (done, total, what is being done). `done` has a fraction where a step takes long; a phase of the work begins
where `done` goes back or `total` changes."""


def silent(done: float, total: int, what: str) -> None:
    """A progress that tells nobody."""
