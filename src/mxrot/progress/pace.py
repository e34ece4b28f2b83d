"""From how far work was at which time: how long it will still take."""

from __future__ import annotations

from collections import deque

TOLERANCE = 1e-9
"""Of a total: sums of fractions go back by this without meaning it."""


class Pace:
    """The pace of one phase of the work.

    It is that of the later half of the time since the phase began: steps that took no time, such as blocks that an
    earlier run has finished, are soon forgotten, and steps that differ are averaged over many.
    """

    def __init__(self, now: float) -> None:
        self.begun = now
        self.done, self.total, self.what = 0.0, 0, ""
        self._seen: deque[tuple[float, float]] = deque()
        """When what was done grew, and to what; the first is no earlier than the beginning of what counts."""

    def tell(self, now: float, done: float, total: int, what: str) -> None:
        """Take in what a Progress is told."""
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
        """From now on; None before the first step, and where the steps before say nothing any more."""
        if self.done >= self.total:
            return 0.0
        each = self._seconds_each(now)
        if each is None:
            return None
        last, after = self._seen[-1]
        needed, waited = each * (self.total - after), now - last
        return needed - waited if waited < needed else needed

    def an_hour(self, now: float) -> float | None:
        """How much of what is counted is done in an hour, at the pace of the time to go; None where there is none."""
        each = None if self.done >= self.total else self._seconds_each(now)
        return None if each is None else 3600 / each

    def _seconds_each(self, now: float) -> float | None:
        """Of one of what is counted; None before the first step, and where the steps before say nothing any more."""
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        if after <= before or last <= first:
            return None
        each = (last - first) / (after - before)
        # Once the whole of the rest should have been done the estimate was wrong: then by all that is known now.
        return each if now - last < each * (self.total - after) else (now - first) / (after - before)

    @property
    def is_one_step(self) -> bool:
        """Is there nothing to count?"""
        return self.total <= 1 and self.done == 0


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
