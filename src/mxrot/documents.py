"""Text files written by other programs: regular files only, UTF-8 in every locale, and strict JSON.

A document that readers would read differently, or fail on, is refused in one sentence: another encoding, a byte order
mark, a repeated key, nesting deeper than 64 levels, numbers of more than 40 digits, NaN.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from mxrot.errors import DamagedError

MOST_BYTES = 1 << 28
MOST_LEVELS = 64
MOST_DIGITS = 40
POINTER = b"version https://git-lfs"
"""The first bytes of a git-lfs pointer, a small file that stands for one that git-lfs has not fetched."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path) -> int:
    """The size in bytes of a regular file. DamagedError for anything else, before it is opened: opening a pipe would
    block."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a null byte in the name
        raise DamagedError(f"{str(path)!r}: not the name of a file") from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "no file")
        raise DamagedError(f"{path}: is {kind}; expected a regular file")
    return found.st_size


def check_is_here(path: Path) -> None:
    """DamagedError if a file is only a git-lfs pointer."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(POINTER)) == POINTER
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    if is_pointer:
        raise DamagedError(
            f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or download the "
            "model with `hf download`"
        )


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. DamagedError if it cannot be read or is not UTF-8."""
    check_is_here(path)
    size = check_regular(path)
    if size > MOST_BYTES:
        raise DamagedError(f"{path}: {size} bytes; expected at most {MOST_BYTES} of text")
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. DamagedError if it holds no object."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`. DamagedError, with `where`, if it is not one."""
    try:
        table = json.loads(
            text,
            object_pairs_hook=_without_twins,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_constant,
        )
    except ValueError as error:
        raise DamagedError(f"{where}: not JSON ({error})") from error
    except RecursionError as error:
        raise DamagedError(f"{where}: not JSON that anything reads (nested too deeply)") from error
    if not isinstance(table, dict):
        raise DamagedError(f"{where}: expected a JSON object")
    if _levels(table) > MOST_LEVELS:
        raise DamagedError(f"{where}: nested deeper than {MOST_LEVELS} levels")
    return table


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twin[:100]!r} is there twice")
    return table


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    if len(text) > MOST_DIGITS or abs(found := float(text)) == float("inf"):
        raise ValueError(f"the number {text[:MOST_DIGITS]} is too long or too large")
    return found


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is no number")
    return float(text)


def _levels(table: Any) -> int:
    """The nesting depth of lists and tables."""
    level, inside = 0, [table]
    while inside and level <= MOST_LEVELS:
        level += 1
        containers = [value for value in inside if isinstance(value, (dict, list))]
        inside = [item for one in containers for item in (one.values() if isinstance(one, dict) else one)]
        inside = [item for item in inside if isinstance(item, (dict, list))]
    return level
