"""Follow a run: report finished work, and end the run before its time limit.

A run ends only after something was finished and kept, so each run with the same limit gets further than the one
before. It ends if the next such moment would probably come too late, judged by the longest time between two of them so
far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Protocol

from mxrot.errors import TimeLimitError
from mxrot.progress.pace import duration
from mxrot.watching.limit import TimeLimit

Event = dict[str, Any]
"""Finished work, as values for JSON. The key `event` names its kind."""


class Listener(Protocol):
    """An object that records events."""

    def hear(self, event: Event) -> None:
        """Record an event permanently, because the run may end at any moment."""

    def close(self) -> None:
        """Called after the last event."""


class Processes(Protocol):
    """The processes of a run. They end together, and one of them records events."""

    rank: int

    def largest(self, count: int) -> int:
        """The maximum of a number over all processes."""


@dataclass
class Watch:
    """Watches a run. Without a limit and listeners it does nothing."""

    limit: TimeLimit | None = None
    listeners: Sequence[Listener] = ()
    largest: Callable[[int], int] = int
    """Of a number over all processes."""
    _started: float = field(default_factory=lambda: time.monotonic())
    _longest: dict[str, float] = field(default_factory=dict)
    """Seconds, by what was finished."""
    _last: dict[str, float] = field(default_factory=dict)
    """When one was finished last, by its kind."""

    def among(self, processes: Processes) -> Watch:
        """The same in one of several processes."""
        listeners = self.listeners if processes.rank == 0 else ()
        return replace(self, listeners=listeners, largest=processes.largest)

    def without_limit(self) -> Watch:
        """The same where nothing that is kept is finished."""
        return replace(self, limit=None)

    def finish(self, what: str, seconds: float | None = None, **event: Any) -> None:
        """Hand on that something of the kind `what` was finished, and took so many seconds: by default those since the
        last one."""
        now = time.monotonic()
        since = now - self._last.get(what, now)
        took = since if seconds is None else seconds
        self._longest[what] = max(self._longest.get(what, 0.0), took, since)
        self._last[what] = now
        about = {"event": what, "time": _now(), "elapsed": round(now - self._started, 3), "seconds": round(took, 3)}
        for listener in self.listeners:
            listener.hear(about | event)

    def skip(self, what: str, seconds: float = 0.0) -> None:
        """Report work of this kind that was finished earlier, with the seconds that it took."""
        self._longest[what] = max(self._longest.get(what, 0.0), seconds)
        self._last[what] = time.monotonic()

    def is_over(self, what: str) -> bool:
        """Would the next work of this kind probably end too late? All processes ask, and get one answer."""
        if self.limit is None:
            return False
        return bool(self.largest(int(self.limit.left() < self._longest.get(what, 0.0))))

    def end_if_over(self, what: str, done: str) -> None:
        """TimeLimitError if the next work of this kind would probably end too late. `done` says how far the run is."""
        if self.is_over(what):
            raise self.ending(what, done)

    def ending(self, what: str, done: str) -> TimeLimitError:
        """The error that ends a run."""
        assert self.limit is not None
        longest, left = self._longest.get(what, 0.0), self.limit.left()
        next_one = f"; the next {what} would take about {_brief(longest)}" if longest else ""
        return TimeLimitError(
            f"stopped after {done}, by the time limit of {duration(self.limit.seconds)}, of which "
            f"{_brief(max(0.0, left))} are left{next_one}"
        )

    def close(self) -> None:
        """Close the listeners."""
        for listener in self.listeners:
            listener.close()


def _brief(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
