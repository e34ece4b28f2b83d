"""Messages about an unknown name, with the known names, the nearest first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_LISTED = 24
"""The maximum number of names in a message."""
LONGEST = 60
"""The maximum number of characters of a wrong name that a message repeats."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The `known` names that are close to `name`, the nearest first. Upper and lower case are the same."""
    folded: dict[str, str] = {}
    for each in known:
        folded.setdefault(each.casefold(), each)
    near = difflib.get_close_matches(name.casefold()[:200], list(folded), n=most, cutoff=0.6)
    return [folded[each] for each in near]


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """The text " did you mean 'a' or 'b'?". Empty if no name is near."""
    near = [repr(each) for each in nearest(name, known, most)]
    return f" did you mean {' or '.join(near)}?" if near else ""


def listed(name: str, known: Iterable[str], most: int = MOST_LISTED) -> str:
    """At most `most` of the `known` names in one line, those nearest to `name` first."""
    every = list(dict.fromkeys(known))
    near = nearest(name, every)
    ordered = [*near, *(each for each in every if each not in near)]
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(ordered[:most]) or "none") + more


def not_known(what: str, name: str, known: Iterable[str]) -> str:
    """The message about an unknown name: "unknown format 'mxpf4'; did you mean 'mxfp4'? known: mxfp4, mxfp6_e2m3"."""
    every = list(dict.fromkeys(known))
    return f"unknown {what} {brief(name)};{did_you_mean(name, every)} known: {listed(name, every)}"


def brief(value: object, most: int = LONGEST) -> str:
    """`repr(value)`. If it is long, its middle is left out."""
    shown = repr(value)
    return shown if len(shown) <= most + 5 else f"{shown[: most - 20]} ... {shown[-20:]}"
