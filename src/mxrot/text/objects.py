"""Texts from Python objects: names, strings, rows, token ids, tensors, data sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mxrot.errors import ConfigError, DataError
from mxrot.text.document import Document, Origin, Text, TokenWindows
from mxrot.text.given import TAKEN, is_array, rows_of, whole_numbers
from mxrot.text.load import load_text, looks_like_file, make_text, names_something
from mxrot.text.roles import Role, split_for
from mxrot.text.rows import Table, documents_of

GIVEN = "given"
"""The name of a text that has none."""


def load_texts(source: Any, role: Role) -> list[Text]:
    """The texts in a Python object, each with its own name.

    A name as on the command line, or a Path, is one text, and so is each item of a list of them. In a mapping each
    value is a text, named by its key. Any other object is one text: strings (each a document), rows as in files,
    conversations, lists of token ids (each a document), an integer tensor or array (several sequences are windows that
    are used unchanged, one sequence is a document), the output of a tokenizer, a `datasets.Dataset` (or one by split),
    a DataFrame, an open file, and any iterable of rows, or of batches of token ids.

    DataError and ConfigError as in `load_text`. ConfigError if two texts have the same name, or for any other type.
    """
    texts = _texts(source, role)
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two texts have the name {name!r}; give them names, as in NAME=FILE")
    if not texts:
        raise DataError(f"no text is given; expected {TAKEN}")
    return texts


def _texts(source: Any, role: Role) -> list[Text]:
    if isinstance(source, Text):
        return [source]
    if isinstance(source, Path):
        return [load_text(str(source), role)]
    if isinstance(source, str):
        return [_one(GIVEN, [source], role) if _is_prose(source) else load_text(source, role)]
    if isinstance(source, Mapping) and not _is_one_text(source):
        return [_renamed(str(name), _texts(value, role)) for name, value in source.items()]
    if isinstance(source, (list, tuple)):
        names = _names_in(source)
        if names is not None:
            return [text for name in names for text in _texts(name, role)]
    return [_one(GIVEN, source, role)]


def _is_prose(text: str) -> bool:
    """True if it is a text itself. A name has one line, and at most the length that file systems allow."""
    return ("\n" in text.strip() or len(text) > 255) and not names_something(text)


def _is_one_text(source: Mapping[str, Any]) -> bool:
    """True for a row, the output of a tokenizer, or a data set by split; False for texts by name."""
    if hasattr(source, "column_names") or "input_ids" in source:
        return True
    return bool({"messages", "conversations", "text"} & source.keys())


def _renamed(name: str, texts: list[Text]) -> Text:
    if len(texts) != 1:
        raise ConfigError(f"{name}: {len(texts)} texts under one name; give each its own")
    text = texts[0]
    return Text(name, text.content, text.weight, text.origin)


def _names_in(items: list[Any] | tuple[Any, ...]) -> list[Any] | None:
    """The items if they name texts, None if they are texts themselves. ConfigError for a mix of both.

    A string of one word can be either. It is read like the others.
    """
    if not items or not all(isinstance(item, (str, Path, Text)) for item in items):
        return None
    named = [not isinstance(item, str) or names_something(item) or looks_like_file(item) for item in items]
    prose = [not name and len(str(item).split()) != 1 for item, name in zip(items, named, strict=True)]
    if any(named) and any(prose):
        shown = str(items[prose.index(True)])[:40]
        raise ConfigError(
            f"a list of names and of texts ({shown!r}...): give one or the other; texts themselves may be given as "
            'rows, {"text": ...}'
        )
    return None if any(prose) else list(items)


def _one(name: str, source: Any, role: Role) -> Text:
    """One text from an object that is not a name."""
    if isinstance(source, (bytes, bytearray)):
        raise ConfigError(f"{name}: bytes are not text; decode them, or give a Path")
    if isinstance(source, Mapping) and hasattr(source, "column_names"):  # datasets.DatasetDict
        source = source[split_for(role, source, name)]
    if callable(getattr(source, "read", None)):
        source = source.read()
        return _one(name, [source] if isinstance(source, str) else source, role)
    if (windows := _given_windows(source)) is not None:
        return Text(name, TokenWindows(whole_numbers(windows, name)))
    names = getattr(source, "column_names", None)
    columns = tuple(names) if isinstance(names, (list, tuple)) else None
    table = Table(name, rows_of(source, name), columns=columns, can_name_column=False)
    if _each_is_text(table.rows):
        documents, origin = _apart(table)
    else:
        documents, origin = documents_of(table)
    return make_text(name, documents, origin, None, name)


def _given_windows(source: Any) -> Any:
    """An array [W, T], or one in a tokenizer's output without padding. None for anything else, such as one sequence."""
    if isinstance(source, Mapping) and "input_ids" in source:
        mask = source.get("attention_mask")
        if mask is not None and not (is_array(mask) and bool(torch.as_tensor(mask).all())):
            return None
        source = source["input_ids"]
    return source if is_array(source) and source.ndim == 2 and len(source) != 1 else None


def _each_is_text(rows: Iterable[Any]) -> bool:
    rows = list(rows)
    return bool(rows) and all(isinstance(row, str) or row is None for row in rows) and any(rows)


def _apart(table: Table) -> tuple[list[Document], Origin]:
    """The strings of a table, each a separate document."""
    documents: list[Document] = []
    nulls = [index + 1 for index, row in enumerate(table.rows) if not row]
    for index, row in enumerate(table.rows):
        if row:
            documents += documents_of(Table(table.where, [row], [index + 1]))[0]
    return documents, Origin(len(table.rows), None, tuple(nulls))
