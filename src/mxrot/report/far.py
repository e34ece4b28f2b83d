"""Figures that are far off: the few that a reader should look at first."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

FAR = 1.5
"""An error is far off from this multiple of the median of its kind."""
FAR_CHANNEL = 20.0
"""A channel sticks out from this multiple of the median channel."""


def far_off(values: Sequence[float | None]) -> list[bool]:
    """True for each value above FAR times the median. None gives False."""
    known = [value for value in values if value is not None]
    limit = FAR * median(known) if known else 0.0
    return [value is not None and value > limit for value in values]
