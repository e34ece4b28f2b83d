"""Rows of a table from any source, and their documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from mxrot.errors import DataError
from mxrot.nearest import listed
from mxrot.text.conversations import ANSWERS, alpaca_messages, looks_like_messages, messages_of
from mxrot.text.decoding import lone_surrogate, without_marks
from mxrot.text.document import Chat, Document, Origin, TokenIds

_CHATS = ("messages", "conversations", "conversation")
_KNOWN = "text, messages, conversations, instruction with output, input_ids"


@dataclass(frozen=True)
class Table:
    """Rows, and their names for messages."""

    where: str
    """The source, usually a file."""
    rows: Sequence[Any]
    """A row is an object by column, a string, a list of messages or of token ids, or None if it is empty."""
    numbers: Sequence[int] | None = None
    """The number of each row, if they do not count from 1."""
    unit: str = "row"
    columns: tuple[str, ...] | None = None
    """The columns that the source declares. None for those of the first row."""
    kind: str = ""
    """The suffix of the file, for messages."""
    can_name_column: bool = True
    """True if the user can name a column after the file name."""

    def place(self, index: int) -> str:
        """The name of a row in messages."""
        return f"{self.where}: {self.unit} {self.number(index)}"

    def number(self, index: int) -> int:
        """The number of a row."""
        return index + 1 if self.numbers is None else self.numbers[index]

    def refused(self, index: int, why: str) -> DataError:
        """The error for a row of an unsupported type."""
        as_what = f"cannot be read as {self.kind}: " if self.kind else ""
        return DataError(f"{self.where}: {as_what}{self.unit} {self.number(index)} {why}")


def documents_of(table: Table, column: str | None = None) -> tuple[list[Document], Origin]:
    """The documents of the rows, without empty rows, and the origin.

    All plain text is one document, joined by blank lines, because a row is often a single line of text. A conversation
    or a list of token ids is a document each. DataError names an unreadable row, or the existing columns.
    """
    chosen, read = _reader(table, column)
    found: list[Document] = []
    nulls = []
    for index, row in enumerate(table.rows):
        document = None if row is None else read(row, index)
        if document is None:
            nulls.append(table.number(index))
        else:
            found.append(document)
    if found and all(isinstance(document, str) for document in found):
        found = ["\n\n".join(str(document) for document in found)]
    if table.rows and not found:
        where = f" in {chosen!r}" if chosen else ""
        raise DataError(f"{table.where}: every {table.unit} is null{where} ({len(table.rows)} of them)")
    return found, Origin(len(table.rows), chosen, tuple(nulls))


RowReader = Callable[[Any, int], Document | None]
"""Takes a row and its index."""


def _reader(table: Table, column: str | None) -> tuple[str | None, RowReader]:
    """The column that is read (None if rows have none), and the function that reads a row."""
    first = next((row for row in table.rows if row is not None), None)
    if first is not None and not isinstance(first, (dict, str, list, tuple)):
        raise table.refused(table.rows.index(first), 'is not an object with a string "text"')
    if first is None or not isinstance(first, dict):
        if column is not None:
            raise DataError(f"{table.where}: its {table.unit}s have no columns, so none is called {column!r}")
        return None, _bare(table)
    columns = table.columns or tuple(first)
    if column is not None:
        if column not in columns:
            raise DataError(f"{table.where}: has no column {column!r}; its columns are {listed(column, columns)}")
        return column, _of_column(column, table)
    if "text" in columns:
        return "text", _of_column("text", table)
    for name in _CHATS:
        if name in columns:
            return name, _of_column(name, table)
    if "instruction" in columns and any(name in columns for name in ANSWERS):
        return "instruction", _alpaca(table)
    if "input_ids" in columns:
        return "input_ids", _of_column("input_ids", table)
    texts = [name for name in columns if _holds_text(table.rows, name)]
    if len(texts) == 1:
        return texts[0], _of_column(texts[0], table)
    raise DataError(f"{table.where}: {_which(table, columns, texts)}")


def _which(table: Table, columns: tuple[str, ...], texts: list[str]) -> str:
    found = f"its columns are {_listed(columns)}" if columns else f"its {table.unit}s have no columns"
    if not texts:
        return f"no column of text; {found}; expected one of {_KNOWN}, or a column of strings"
    how = f"name one: {table.where}:{texts[0]}" if table.can_name_column else "keep one, or call it text"
    return f"{len(texts)} columns of text ({_listed(texts)}), and none of {_KNOWN}; {how}"


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def _holds_text(rows: Sequence[Any], name: str) -> bool:
    """True if every value of the column is a string or null, and at least one is not a number."""
    some = False
    for row in rows:
        value = row.get(name) if isinstance(row, dict) else None
        if value is not None and not isinstance(value, str):
            return False
        some = some or (value is not None and not _is_number(value))
    return some


def _is_number(value: str) -> bool:
    try:
        float(value or "0")
    except ValueError:
        return False
    return True


def _bare(table: Table) -> RowReader:
    """A reader for rows without columns."""

    def read(row: Any, index: int) -> Document | None:
        if not isinstance(row, str) and not looks_like_messages(row) and not _looks_like_ids(row):
            raise table.refused(index, "is neither text nor messages nor token ids, as the first one is")
        return _document(row, table.place(index))

    return read


def _of_column(name: str, table: Table) -> RowReader:
    """A reader for rows with one document each, in that column."""
    expected = 'is not an object with a string "text"' if name == "text" else f"has no {name!r}"

    def read(row: Any, index: int) -> Document | None:
        if not isinstance(row, dict) or name not in row:
            raise table.refused(index, expected)
        return _document(row[name], f"{table.place(index)}, column {name!r}", row)

    return read


def _alpaca(table: Table) -> RowReader:
    """A reader for rows with an instruction and an answer."""

    def read(row: Any, index: int) -> Document | None:
        if not isinstance(row, dict) or "instruction" not in row or not any(name in row for name in ANSWERS):
            raise table.refused(index, "has no instruction with an output")
        if row["instruction"] is None and all(row.get(name) is None for name in ANSWERS):
            return None
        return _chat(alpaca_messages(row, table.place(index)), table.place(index), None)

    return read


def _document(value: Any, place: str, row: dict[str, Any] | None = None) -> Document | None:
    row = row or {}
    if value is None:
        return None
    if isinstance(value, str):
        return _written(value, place)
    value = value.tolist() if hasattr(value, "tolist") else value  # of NumPy or torch
    if isinstance(value, (list, tuple)) and not value:
        return None
    if _looks_like_ids(value):
        return TokenIds(torch.tensor(_unmasked(value, row.get("attention_mask")), dtype=torch.int64))
    if looks_like_messages(value):
        tools = row.get("tools")
        return _chat(messages_of(value, place, row.get("system")), place, tools if isinstance(tools, list) else None)
    raise DataError(f"{place}: holds {type(value).__name__}; expected text, messages or token ids")


def _chat(messages: list[dict[str, Any]], place: str, tools: list[Any] | None) -> Chat:
    for message in messages:
        _written(message["content"], place)
    return Chat(messages, place, tools or None)


def _written(text: str, place: str) -> str:
    """`text` without byte order marks. DataError if it cannot be written as text."""
    if (half := lone_surrogate(text)) is not None:
        raise DataError(f"{place}: holds {half}, half of a character without its other half; correct or remove it")
    return without_marks(text)


def _looks_like_ids(value: Any) -> bool:
    """True for a list of integers."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(item, Integral) and not isinstance(item, bool) for item in value)


def _unmasked(ids: Sequence[int], mask: Any) -> list[int]:
    """The ids without padding."""
    mask = mask.tolist() if hasattr(mask, "tolist") else mask
    if not isinstance(mask, (list, tuple)) or len(mask) != len(ids):
        return list(ids)
    return [token for token, kept in zip(ids, mask, strict=True) if kept]
