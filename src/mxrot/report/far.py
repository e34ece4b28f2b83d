"""What is far off: the few figures of many that a reader should look at first."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

FAR = 1.5
"""Times the median of its like, from which an error is far off."""
FAR_CHANNEL = 20.0
"""Times the median channel, from which a channel sticks out."""


def far_off(values: Sequence[float | None]) -> list[bool]:
    """Which are more than FAR times their median; nothing that is None."""
    known = [value for value in values if value is not None]
    limit = FAR * median(known) if known else 0.0
    return [value is not None and value > limit for value in values]
