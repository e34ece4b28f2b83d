"""Patterns of `ignore`: the error for one that matches no linear, with a suggestion.

Patterns are shell-style, on the full name of a linear or its last part. Other tools use regular expressions, or the
names of modules that contain linears. A suggestion for these has been tried on the names of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import product

from mxrot.models.family import is_ignored
from mxrot.nearest import brief, did_you_mean, listed

_REGULAR = re.compile(r"^re:|^\.\*|\.\+|[\\^$|()]")
"""Marks of a regular expression that no shell-style pattern of names has."""
_MOST_ALTERNATIVES = 12


def matches_nothing(pattern: str, linears: Sequence[str], modules: Iterable[str]) -> str | None:
    """The problem of a pattern that matches none of the `linears`; None if it matches one.

    `linears` are full names, `modules` the names of all modules.
    """
    if any(is_ignored(name, (pattern,)) for name in linears):
        return None
    last = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    return (
        f"{brief(pattern)} matches no linear of the model{_meaning(pattern, linears, modules)}; patterns are "
        f"shell-style, on the full name of a linear ({linears[0]}) or its last part: {listed(pattern, last)}"
    )


def _meaning(pattern: str, linears: Sequence[str], modules: Iterable[str]) -> str:
    """The probable meaning of the pattern, as part of a sentence."""
    if _REGULAR.search(pattern):
        found = [_shell(part, linears) for part in _alternatives(pattern)]
        meant = list(dict.fromkeys(part for part in found if part is not None))
        shown = f"; write {_as_toml(meant)}" if meant and None not in found else ""
        return f": regular expressions are not read{shown}"
    meant_one = _shell(pattern, linears)
    if meant_one is not None:
        is_module = any(f".{pattern}." in f".{name}" for name in linears)
        return f"{', but a module that holds some' if is_module else ''}; write {_as_toml([meant_one])}"
    others = set(modules) - set(linears) - {""}
    if any(fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern) for name in others):
        return ", but what is left as it is anyway; take it out"
    last = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    near = did_you_mean(pattern, last) or did_you_mean(pattern, linears, most=1)
    return f" ({near.strip()})" if near else ""


def _shell(text: str, linears: Sequence[str]) -> str | None:
    """A shell pattern like `text` that matches a linear; None if there is none."""
    text = re.sub(r"[\[\]\"'\s]", "", text)
    for suffix in (".weight", ".bias"):
        text = text.removesuffix(suffix)
    if not text.strip("*."):
        return None
    if _any(text, linears):
        return text
    below = next((p for p in (f"{text}.*", f"*.{text}.*") if _any(p, linears)), None)
    if below is not None:  # a module; without dots if that matches no other
        wide = f"*{text}*"
        return wide if _all(wide, linears) == _all(f"*.{text}.*", linears) and not text[-1].isdigit() else below
    return next((p for p in (f"*.{text}", f"*{text}") if _any(p, linears)), None)


def _any(pattern: str, linears: Sequence[str]) -> bool:
    return any(is_ignored(name, (pattern,)) for name in linears)


def _all(pattern: str, linears: Sequence[str]) -> list[str]:
    return [name for name in linears if is_ignored(name, (pattern,))]


def _alternatives(pattern: str) -> Iterator[str]:
    """The alternatives of a simple regular expression, as shell patterns."""
    text = pattern.removeprefix("re:").strip().removeprefix("^").removesuffix("$")
    pieces = re.split(r"\((?:\?:)?([^()]*)\)", text)
    groups = [piece.split("|") if number % 2 else [piece] for number, piece in enumerate(pieces)]
    count = 0
    for chosen in product(*groups):
        for part in "".join(chosen).split("|"):
            shell = re.sub(r"\.[*+]\??|\\d[*+]?|\[0-9\][*+]?", "*", part.removeprefix("^").removesuffix("$"))
            yield re.sub(r"\*+", "*", shell.replace("\\", ""))
            count += 1
            if count == _MOST_ALTERNATIVES:
                return


def _as_toml(patterns: Sequence[str]) -> str:
    return "ignore = [" + ", ".join(f'"{pattern}"' for pattern in patterns) + "]"
