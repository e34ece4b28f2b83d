"""The rows of Python objects: iterables, arrays, pandas and Arrow tables, batches of a loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mxrot.errors import ConfigError, DataError
from mxrot.text.conversations import looks_like_messages

MOST_CHARACTERS = 1 << 30
"""The most characters that are read from a source without a length, such as a stream, which may never end."""
TAKEN = (
    "a name or a Path, a list of them, strings, rows (dicts), conversations, token ids, a tensor [windows, tokens], "
    "or a data set"
)


def rows_of(source: Any, name: str) -> list[Any]:
    """The rows of the source: objects by column, strings, conversations or lists of token ids.

    ConfigError if it has no rows or no order, DataError if it seems endless.
    """
    if isinstance(source, Mapping) and isinstance(source.get("text"), (list, tuple)):  # a piece of a data set
        return [{"text": value} for value in source["text"]]
    if isinstance(source, Mapping) or looks_like_messages(source) or is_ids(source):
        return [row for row in _batch(source, name)] if isinstance(source, Mapping) else [list(source)]
    if is_array(source):
        return _sequences(source, name)
    if hasattr(source, "to_pylist"):  # pyarrow
        return list(source.to_pylist())
    if hasattr(source, "iloc") and hasattr(source, "to_dict"):  # pandas
        found = source.to_dict("records") if hasattr(source, "columns") else source.tolist()
        return [_without_nan(row) for row in found]
    if isinstance(source, Set):
        raise ConfigError(f"{name}: a set has no order, and windows would be others each time; give a list")
    if not isinstance(source, Iterable):
        raise ConfigError(f"{name}: a {type(source).__name__} is not a text; expected {TAKEN}")
    rows = source if hasattr(source, "__len__") else _bounded(source, name)
    return [part for row in rows for part in _batch(row, name)]


def is_array(value: Any) -> bool:
    """True for a tensor, or a NumPy array of numbers."""
    if isinstance(value, Tensor):
        return True
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return hasattr(value, "__array__") and hasattr(value, "ndim") and not hasattr(value, "iloc") and kind in "biufc"


def is_ids(value: Any) -> bool:
    """True for a list of integers."""
    if not isinstance(value, (list, tuple, range)) or not value:
        return False
    return all(isinstance(item, Integral) and not isinstance(item, bool) for item in value)


def whole_numbers(array: Any, name: str) -> Tensor:
    """Token ids as int64 on the CPU. ConfigError if they are not integers."""
    ids = torch.as_tensor(array)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"{name}: token ids are whole numbers, got {str(ids.dtype).removeprefix('torch.')}")
    return ids.detach().cpu().to(torch.int64)


def _batch(row: Any, name: str) -> Iterator[Any]:
    """The rows in one batch of a loader: sequences of token ids, alone or with their mask or targets."""
    if isinstance(row, tuple) and row and is_array(row[0]):  # inputs and targets, as GPTQ's loaders give them
        row = row[0]
    if is_array(row):
        yield from _sequences(row, name)
    elif isinstance(row, Mapping) and "input_ids" in row:
        yield from _encoded(row, name)
    else:
        yield row


def _encoded(row: Mapping[str, Any], name: str) -> Iterator[Any]:
    """One row per sequence in the output of a tokenizer."""
    ids, mask = (_as_list(row.get(key)) for key in ("input_ids", "attention_mask"))
    if not isinstance(ids, (list, tuple)) or not ids or not isinstance(ids[0], (list, tuple, Tensor)):
        yield {**row, "input_ids": ids, "attention_mask": mask}
        return
    for number, sequence in enumerate(ids):
        yield {"input_ids": sequence, "attention_mask": None if mask is None else mask[number]}


def _as_list(value: Any) -> Any:
    return value.tolist() if is_array(value) else value


def _sequences(array: Any, name: str) -> list[list[int]]:
    """Token ids [T] or [sequences, T] as lists."""
    if array.ndim not in (1, 2):
        raise ConfigError(f"{name}: token ids of shape {tuple(array.shape)}; expected [tokens] or [windows, tokens]")
    ids = whole_numbers(array, name)
    found: list[list[int]] = (ids[None] if ids.dim() == 1 else ids).tolist()
    return found


def _without_nan(row: Any) -> Any:
    """The row without NaN, which pandas uses for missing values."""
    if isinstance(row, dict):
        return {key: _without_nan(value) for key, value in row.items()}
    return None if isinstance(row, float) and row != row else row


def _bounded(source: Iterable[Any], name: str) -> list[Any]:
    """The rows of a source without a length."""
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
