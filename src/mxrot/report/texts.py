"""A description of the windows that were read of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mxrot.text.document import OWN_READ_AS


def text_lines(tables: Sequence[dict[str, Any]]) -> list[str]:
    """One line per text, from the records of the windows that were read (`Windows.as_table`)."""
    return [text_line(table) for table in tables]


def text_line(table: dict[str, Any]) -> str:
    """The number of windows, and of those taken; the tokens outside of windows; rows and files that were left out."""
    if table["read_as"] == OWN_READ_AS:
        return f"text {table['name']}: {_count(table['windows'], 'window')} of {table['seq_len']:,}, {OWN_READ_AS}"
    taken, filled, asked = table["windows"], table["windows_filled"], table["windows_asked"]
    parts = [f"{table['tokens']:,} tokens, {_count(filled, 'window')} of {table['seq_len']:,}"]
    if asked is not None and asked > filled:
        parts.append(f"asked for {asked}, it has no more")
    elif taken < filled:
        parts.append(f"{taken} taken")
    if left := table["tokens_left_out"]:
        end = ", the end-of-text token among them" if table["end_token_left_out"] else ""
        parts.append(f"{_count(left, 'token')} at its end, too few for a window, left out{end}")
    if table["read_as"] != "text":
        parts.append(f"read as {table['read_as']}")
    if (column := table.get("column")) not in (None, "text"):
        parts.append(f"column {column}")
    if files := table.get("files"):
        parts.append(_count(files, "file"))
    if others := table.get("other_files"):
        parts.append(f"{_count(others, 'file')} of other kinds left out ({_first(table['first_other_files'], others)})")
    if nulls := table.get("null_rows"):
        named = _first(table["first_null_rows"], nulls)
        parts.append(f"{_count(nulls, 'row')} of {table['rows']} {_is(nulls)} null and left out ({named})")
    return f"text {table['name']}: {'; '.join(parts)}"


def _first(names: Sequence[Any], count: int) -> str:
    return ", ".join(map(str, names)) + (", ..." if count > len(names) else "")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _is(number: int) -> str:
    return "is" if number == 1 else "are"
