"""Steps of work, long and short, as one phase, so that the remaining time is that of the whole."""

from __future__ import annotations

from collections.abc import Sequence

from mxrot.progress import Progress

TOTAL = 100
"""The total of every report."""


class Steps:
    """Steps of known weights, in any unit. Each has its own phases, and the reported count never decreases."""

    def __init__(self, progress: Progress, steps: Sequence[Sequence[float]]) -> None:
        """`steps` are the weights of the phases of each step."""
        self._progress, self._steps = progress, [list(phases) for phases in steps]
        self._whole = sum(map(sum, self._steps)) or 1.0
        self._done = 0.0

    def of(self, number: int, label: str) -> Progress:
        """The progress function of step `number`. A phase begins when its count decreases or its total changes."""
        phases = self._steps[number]
        begin = sum(map(sum, self._steps[:number]))
        phase, last = -1, (0.0, 0)

        def told(done: float, total: int, what: str) -> None:
            nonlocal phase, last
            if total > 1 or done:
                if phase < 0 or total != last[1] or done < last[0]:
                    phase = min(phase + 1, len(phases) - 1)
                last = (done, total)
                within = sum(phases[:phase]) + phases[phase] * min(1.0, done / max(1, total))
                self._done = max(self._done, TOTAL * (begin + within) / self._whole)
            self._progress(self._done, TOTAL, f"{label}, {what}")

        return told
