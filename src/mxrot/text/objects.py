"""Texts as Python has them: names, strings, rows, token ids, tensors, data sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxrot.errors import ConfigError, DataError
from mxrot.text.conversations import looks_like_messages
from mxrot.text.document import Document, Origin, Text, TokenWindows
from mxrot.text.load import load_text, looks_like_file, make_text, names_something
from mxrot.text.roles import Role, split_for
from mxrot.text.rows import Table, documents_of

GIVEN = "given"
"""The name of a text that came without one."""
MOST_CHARACTERS = 1 << 30
"""That are read of something without a length, such as a stream, which may have no end."""
_TAKEN = (
    "a name or a Path, a list of them, strings, rows (dicts), conversations, token ids, a tensor [windows, tokens], "
    "or a data set"
)


def load_texts(source: Any, role: Role) -> list[Text]:
    """The texts in whatever a caller has; each has a name of its own.

    A name as on the command line or a Path is one text, and so is each of a list of them; with a mapping each value is
    a text by the name of its key. All else is one text: strings (each a document), rows as files have them,
    conversations, lists of token ids, an integer tensor or array (of one dimension: a document; of two: windows that
    are taken as they are), what a tokenizer returns, a `datasets.Dataset` (or one by split), a DataFrame, and anything
    that gives rows one after the other.
    DataError and ConfigError as `load_text`; ConfigError if two texts have the same name or it is none of these.
    """
    texts = _texts(source, role)
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two texts are called {name!r}; name them, as in NAME=FILE")
    if not texts:
        raise DataError(f"no text is given; expected {_TAKEN}")
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
    """Is it a text itself? A name has one line, and the length that systems allow."""
    return ("\n" in text.strip() or len(text) > 255) and not names_something(text)


def _is_one_text(source: Mapping[str, Any]) -> bool:
    """Is it a row, what a tokenizer returns, or a data set by split, and not texts by name?"""
    if hasattr(source, "column_names") or "input_ids" in source:
        return True
    return bool({"messages", "conversations", "text"} & source.keys())


def _renamed(name: str, texts: list[Text]) -> Text:
    if len(texts) != 1:
        raise ConfigError(f"{name}: {len(texts)} texts under one name; give each its own")
    text = texts[0]
    return Text(name, text.content, text.weight, text.origin)


def _names_in(items: list[Any] | tuple[Any, ...]) -> list[Any] | None:
    """The items, if they name texts; None if they are a text themselves. ConfigError if some are and some are not.

    A string of one word may be either: it is as the others are.
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
    """One text of what is not a name."""
    if isinstance(source, (bytes, bytearray)):
        raise ConfigError(f"{name}: bytes are no text; decode them, or give a Path")
    if isinstance(source, Mapping) and hasattr(source, "column_names"):  # datasets.DatasetDict
        source = source[split_for(role, source, name)]
    if isinstance(source, Mapping) and "input_ids" in source:
        return _of_encoding(name, source)
    if _is_array(source) and source.ndim == 2:
        return Text(name, TokenWindows(_whole(torch.as_tensor(source), name)))
    table = Table(name, _rows(source, name), columns=_columns(source), can_name_column=False)
    if _each_is_text(table.rows):
        documents, origin = _apart(table)
    else:
        documents, origin = documents_of(table)
    return make_text(name, documents, origin, None, name)


def _rows(source: Any, name: str) -> list[Any]:
    if isinstance(source, Mapping) and isinstance(source.get("text"), (list, tuple)):  # a piece of a data set
        return [{"text": value} for value in source["text"]]
    if isinstance(source, Mapping) or looks_like_messages(source) or _is_ids(source):
        return [source]
    if _is_array(source):
        return [_whole(torch.as_tensor(source), name).tolist()] if source.ndim == 1 else [_bad_shape(source, name)]
    if hasattr(source, "to_pylist"):  # pyarrow.Table
        return list(source.to_pylist())
    if hasattr(source, "to_dict") and hasattr(source, "iloc"):  # pandas.DataFrame
        return list(source.to_dict("records"))
    if not isinstance(source, Iterable):
        raise ConfigError(f"{name}: a {type(source).__name__} is no text; expected {_TAKEN}")
    rows = list(source) if hasattr(source, "__len__") else _bounded(source, name)
    return [_row(row, name) for row in rows]


def _row(row: Any, name: str) -> Any:
    """A tensor of ids as a list; those of one sequence may have a dimension for it, as GPTQ's loaders give them."""
    if _is_array(row):
        if row.ndim == 2 and row.shape[0] == 1:
            row = row[0]
        return _whole(torch.as_tensor(row), name).tolist() if row.ndim == 1 else _bad_shape(row, name)
    return row


def _columns(source: Any) -> tuple[str, ...] | None:
    names = getattr(source, "column_names", None)
    return tuple(names) if isinstance(names, (list, tuple)) else None


def _bounded(source: Iterable[Any], name: str) -> list[Any]:
    """The rows of something without a length; DataError if it has no end."""
    rows, size = [], 0
    for row in source:
        rows.append(row)
        size += len(row if isinstance(row, str) else str(row))
        if size > MOST_CHARACTERS:
            raise DataError(
                f"{name}: more than {MOST_CHARACTERS:.1e} characters, after {len(rows)} rows of something without a "
                "length; take a part of it, as with .take(1000) or itertools.islice"
            )
    return rows


def _each_is_text(rows: Iterable[Any]) -> bool:
    rows = list(rows)
    return bool(rows) and all(isinstance(row, str) or row is None for row in rows) and any(rows)


def _apart(table: Table) -> tuple[list[Document], Origin]:
    """Strings, each a document of its own."""
    documents: list[Document] = []
    nulls = [index + 1 for index, row in enumerate(table.rows) if not row]
    for index, row in enumerate(table.rows):
        if row:
            documents += documents_of(Table(table.where, [row], [index + 1]))[0]
    return documents, Origin(len(table.rows), None, tuple(nulls))


def _of_encoding(name: str, encoding: Mapping[str, Any]) -> Text:
    """What a tokenizer returns; padding is left out."""
    ids, mask = encoding["input_ids"], encoding.get("attention_mask")
    if _is_array(ids) and ids.ndim == 2 and (mask is None or bool(torch.as_tensor(mask).all())):
        return Text(name, TokenWindows(_whole(torch.as_tensor(ids), name)))
    ids = ids.tolist() if _is_array(ids) else ids
    mask = mask.tolist() if mask is not None and _is_array(mask) else mask
    if _is_ids(ids):
        ids, mask = [ids], [mask]
    masks = [None] * len(ids) if mask is None else mask
    rows = [{"input_ids": row, "attention_mask": kept} for row, kept in zip(ids, masks, strict=True)]
    documents, origin = documents_of(Table(name, rows, columns=("input_ids",)))
    return make_text(name, documents, origin, None, name)


def _is_array(value: Any) -> bool:
    """A tensor, or an array of NumPy."""
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "ndim"))


def _is_ids(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(item, Integral) and not isinstance(item, bool) for item in value)


def _whole(ids: Tensor, name: str) -> Tensor:
    """Token ids as int64 on the CPU; ConfigError if they are not whole numbers."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"{name}: token ids are whole numbers, got {str(ids.dtype).removeprefix('torch.')}")
    return ids.detach().cpu().to(torch.int64)


def _bad_shape(array: Any, name: str) -> Any:
    raise ConfigError(f"{name}: token ids of shape {tuple(array.shape)}; expected [tokens] or [windows, tokens]")
