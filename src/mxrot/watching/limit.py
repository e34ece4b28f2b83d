"""A limit of time, and how people write one."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from mxrot.errors import ConfigError

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?){unit})?" for unit in _UNITS))


@dataclass(frozen=True)
class TimeLimit:
    """So many seconds from a moment on."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds from now on; below 0 once they are over."""
        return self.started + self.seconds - time.monotonic()


def seconds_of(text: str, option: str) -> float:
    """Of a duration such as 90m, 8h, 1h30m or 1d; ConfigError, which names the option, for anything else."""
    found = _DURATION.fullmatch(text.strip().lower())
    parts = {} if found is None else {unit: float(count) for unit, count in found.groupdict().items() if count}
    seconds = sum(_UNITS[unit] * count for unit, count in parts.items())
    if not seconds:
        raise ConfigError(f"{option} {text}: is not a duration; write it as in 90m, 8h, 1h30m or 1d")
    return seconds
