"""A clock that moves only when a test says so, in the place of the module `time`."""

from __future__ import annotations


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now
