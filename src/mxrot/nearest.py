"""A name that nobody knows: what is said of it, with the names that there are, the nearest first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_LISTED = 24
"""Names in a message at most."""
LONGEST = 60
"""Characters of a wrong name that are repeated."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Of the `known` names those that `name` may stand for, the nearest first; the case of letters does not count."""
    folded: dict[str, str] = {}
    for each in known:
        folded.setdefault(each.casefold(), each)
    near = difflib.get_close_matches(name.casefold()[:200], list(folded), n=most, cutoff=0.6)
    return [folded[each] for each in near]


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """ " did you mean 'a' or 'b'?"; empty where none is near."""
    near = [repr(each) for each in nearest(name, known, most)]
    return f" did you mean {' or '.join(near)}?" if near else ""


def listed(name: str, known: Iterable[str], most: int = MOST_LISTED) -> str:
    """The `known` names in one line, those nearest to `name` first, at most `most` of them."""
    every = list(dict.fromkeys(known))
    near = nearest(name, every)
    ordered = [*near, *(each for each in every if each not in near)]
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(ordered[:most]) or "none") + more


def not_known(what: str, name: str, known: Iterable[str]) -> str:
    """What an error says of a name: "unknown format 'mxpf4'; did you mean 'mxfp4'? known: mxfp4, mxfp6_e2m3"."""
    every = list(dict.fromkeys(known))
    return f"unknown {what} {brief(name)};{did_you_mean(name, every)} known: {listed(name, every)}"


def brief(value: object, most: int = LONGEST) -> str:
    """`repr(value)`, without its middle where it is long."""
    shown = repr(value)
    return shown if len(shown) <= most + 5 else f"{shown[: most - 20]} ... {shown[-20:]}"
