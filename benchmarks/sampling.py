"""Where a thread spends its time, by looking at its stack many times a second.

Sees one thread alone, whatever others do beside it, and costs next to nothing. With CUDA_LAUNCH_BLOCKING=1 the time
that a GPU computes is that of the line which has launched it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERVAL = 0.005
"""Seconds between two looks."""


class Samples:
    """How often functions, and lines of them, were on the stack."""

    def __init__(self, part: str) -> None:
        """Of files whose path holds `part`."""
        self._part = part
        self._inside: Counter[str] = Counter()
        self._at: Counter[str] = Counter()
        self._looks = 0
        self.seconds = 0.0

    def look(self, frame: FrameType | None) -> None:
        """Count what is on a stack: each function once, and the innermost line."""
        self._looks += 1
        names: set[str] = set()
        innermost = None
        while frame is not None:
            code = frame.f_code
            if self._part in code.co_filename:
                file = code.co_filename.split(self._part, 1)[1]
                names.add(f"{file}:{code.co_name}")
                innermost = innermost or f"{file}:{frame.f_lineno} {code.co_name}"
            frame = frame.f_back
        self._inside.update(names)
        if innermost is not None:
            self._at[innermost] += 1

    def table(self, most: int) -> str:
        """The functions with most seconds inside them, and the lines that were innermost."""
        each = self.seconds / max(1, self._looks)
        parts = (("inside", self._inside), ("at", self._at))
        rows = [(name, *one) for name, counts in parts for one in counts.most_common(most)]
        lines = [f"{name:7} {count * each:8.2f} s  {place}" for name, place, count in rows]
        return "\n".join(lines)


@contextmanager
def sampled(part: str = "/mxrot/") -> Iterator[Samples]:
    """Look at the thread that is here, until it leaves."""
    samples, own, ended = Samples(part), threading.get_ident(), threading.Event()

    def watch() -> None:
        started = time.monotonic()
        while not ended.wait(INTERVAL):
            samples.look(sys._current_frames().get(own))
        samples.seconds = time.monotonic() - started

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
