"""The remaining time of work, from its progress so far."""

from __future__ import annotations

from collections import deque

TOLERANCE = 1e-9
"""A share of the total. Sums of fractions can decrease by this through rounding."""


class Pace:
    """The pace of one phase of the work.

    It is taken over the later half of the time since the phase began. So steps that took no time, such as blocks that
    an earlier run has finished, are soon forgotten, and steps of different length are averaged.
    """

    def __init__(self, now: float) -> None:
        self.begun = now
        self.done, self.total, self.what = 0.0, 0, ""
        self._seen: deque[tuple[float, float]] = deque()
        """The times when `done` grew, and its values. The first is no earlier than the counted interval."""

    def tell(self, now: float, done: float, total: int, what: str) -> None:
        """Take in a report, with the arguments of a Progress."""
        is_new = total != self.total or done < self.done - TOLERANCE * total
        if is_new:
            self.begun = now
            self._seen.clear()
        if is_new or done > self.done:
            self._seen.append((now, done))
        self.done, self.total, self.what = done, total, what
        middle = (self.begun + now) / 2
        while len(self._seen) > 2 and self._seen[1][0] <= middle:
            self._seen.popleft()

    def seconds_to_go(self, now: float) -> float | None:
        """The remaining seconds. None before the first step, and if the earlier steps no longer allow an estimate."""
        if self.done >= self.total:
            return 0.0
        each = self._seconds_each(now)
        if each is None:
            return None
        last, after = self._seen[-1]
        needed, waited = each * (self.total - after), now - last
        return needed - waited if waited < needed else needed

    def an_hour(self, now: float) -> float | None:
        """The units per hour at the pace of the remaining time. None if there is no estimate."""
        each = None if self.done >= self.total else self._seconds_each(now)
        return None if each is None else 3600 / each

    def _seconds_each(self, now: float) -> float | None:
        """The seconds per unit. None before the first step, and if the earlier steps no longer allow an estimate."""
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        if after <= before or last <= first:
            return None
        each = (last - first) / (after - before)
        # If the whole rest should be done by now, the estimate was wrong: use the time up to now.
        return each if now - last < each * (self.total - after) else (now - first) / (after - before)

    @property
    def is_one_step(self) -> bool:
        """True if there is nothing to count."""
        return self.total <= 1 and self.done == 0


def duration(seconds: float) -> str:
    """A duration in words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
