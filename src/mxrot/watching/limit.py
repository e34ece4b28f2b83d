"""A time limit, and its notation."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from mxrot.errors import ConfigError

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?){unit})?" for unit in _UNITS))


@dataclass(frozen=True)
class TimeLimit:
    """A number of seconds from a given moment."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """The remaining seconds. Negative once the limit has passed."""
        return self.started + self.seconds - time.monotonic()


def seconds_of(text: str, option: str) -> float:
    """The limit for a duration such as 90m, 8h, 1h30m or 1d. ConfigError, with the option, for other text."""
    found = _DURATION.fullmatch(text.strip().lower())
    parts = {} if found is None else {unit: float(count) for unit, count in found.groupdict().items() if count}
    seconds = sum(_UNITS[unit] * count for unit, count in parts.items())
    if not seconds:
        raise ConfigError(f"{option} {text}: is not a duration; write it as in 90m, 8h, 1h30m or 1d")
    return seconds
