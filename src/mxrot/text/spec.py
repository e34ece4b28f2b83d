"""The name of a text on the command line: [NAME=]PLACE[:COLUMN][@WEIGHT].

PLACE is `demo`, a file, a folder, or a data set of the hub, with [:CONFIG[:SPLIT[:COLUMN]]] after its id. An existing
file or folder takes precedence, whatever characters its name has.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from mxrot.errors import ConfigError

_WEIGHT = re.compile(r"(.+)@([0-9.]+(?:[eE][+-]?[0-9]+)?)")


@dataclass(frozen=True)
class Spec:
    """The parts of a name."""

    name: str
    """Empty if none is given."""
    place: str
    column: str | None = None
    weight: float | None = None


def parse_spec(spec: str) -> Spec:
    """The parts of `spec`. ConfigError if its weight is not a positive number."""
    if exists(spec):
        return Spec("", spec)
    weight = None
    if (match := _WEIGHT.fullmatch(spec)) is not None:
        spec, weight = match[1], _weight(match[2], spec)
    named, equals, rest = spec.partition("=")
    candidates = [("", spec)] + ([(named, rest)] if equals else [])
    for name, place in candidates:
        if exists(place):
            return Spec(name, place, None, weight)
        # From the right: a place may hold colons of its own, as paths of Windows do.
        for cut in (match.start() for match in reversed(list(re.finditer(":", place)))):
            if exists(place[:cut]) and place[cut + 1 :]:
                return Spec(name, place[:cut], place[cut + 1 :], weight)
    name, place = candidates[-1]
    return Spec(name, place, None, weight)


def exists(place: str) -> bool:
    """True if this path exists."""
    try:
        return bool(place) and Path(place).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such user
        return False


def _weight(text: str, spec: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"{spec}: the weight after @ must be a positive number, got {text}")
    return weight
