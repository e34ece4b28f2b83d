"""Files of rows: JSON and JSON lines, CSV and TSV, parquet, Arrow."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mxrot.errors import ConfigError, DataError
from mxrot.text.conversations import looks_like_messages
from mxrot.text.decoding import decode
from mxrot.text.rows import Table


def read_json(data: bytes, path: Path, column: str | None = None) -> Table:
    """The rows of an array, of JSON lines, or of one object, by the content of the file and not by its name."""
    content = decode(data, path)
    start = content.lstrip()
    if start.startswith("["):
        whole = _parsed_whole(content, path)
        if whole is not None:
            rows = [whole] if looks_like_messages(whole) else whole
            return Table(str(path), rows, kind=path.suffix)
    if start.startswith("{"):
        whole = _parsed_whole(content, path)
        if isinstance(whole, dict):
            return Table(str(path), _rows_of_object(whole, column), kind=path.suffix)
    return _json_lines(content, path)


def _rows_of_object(whole: dict[str, Any], column: str | None) -> list[Any]:
    """The rows in an object that only holds them, as {"data": [...]}. Any other object is the only row."""
    lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    holds_rows = len(lists) == 1 and not looks_like_messages(lists[0]) and column not in whole and "text" not in whole
    return lists[0] if holds_rows else [whole]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed_whole(content: str, path: Path) -> Any:
    """The value of a file. None if it holds several values, one a line."""
    try:
        value, end = json.JSONDecoder().raw_decode(content, len(content) - len(content.lstrip()))
    except RecursionError as error:
        raise DataError(f"{path}: cannot be read as {path.suffix}: nested too deeply") from error
    except ValueError as error:
        if _is_json(content.lstrip().split("\n", 1)[0]):
            return None
        raise DataError(f"{path}: cannot be read as {path.suffix}: {error}") from error
    return value if not content[end:].strip() else None


def _json_lines(content: str, path: Path) -> Table:
    rows, numbers = [], []
    # Not splitlines(): a JSON string may hold U+2028 and other line breaks as they are.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except RecursionError as error:
            raise DataError(f"{path}: cannot be read as {path.suffix}: line {number} is nested too deeply") from error
        except ValueError as error:
            raise DataError(f"{path}: cannot be read as {path.suffix}: line {number} is not JSON: {error}") from error
        numbers.append(number)
    return Table(str(path), rows, numbers, "line", kind=path.suffix)


def read_separated(data: bytes, path: Path, separator: str) -> Table:
    """CSV or TSV with a header line. The separator is a semicolon if the header has semicolons and no comma."""
    content = decode(data, path)
    header_line = content.split("\n", 1)[0]
    if separator == "," and ";" in header_line and "," not in header_line:
        separator = ";"
    rows: list[dict[str, str | None]] = []
    numbers: list[int] = []
    with _fields_of_any_length():
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
        try:
            names = next(reader, [])
            last = reader.line_num
            for fields in reader:
                number, last = last + 1, reader.line_num
                if not fields:
                    continue
                if len(fields) > len(names):
                    raise DataError(f"{path}: line {number} has {len(fields)} fields, and line 1 names {len(names)}")
                values: list[str | None] = [*fields, *[None] * (len(names) - len(fields))]
                rows.append({name: value or None for name, value in zip(names, values, strict=True)})
                numbers.append(number)
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num} cannot be read as {path.suffix}: {error}") from error
    return Table(str(path), rows, numbers, "line", tuple(names), kind=path.suffix)


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """While open, csv accepts fields of more than 128 kB. The limit is a setting of the whole process."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_parquet(data: bytes, path: Path, column: str | None = None) -> Table:
    """The columns of a parquet file that may be read."""
    pyarrow = _pyarrow(path.name)
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        names = tuple(file.schema_arrow.names)
        return _table(file.read(columns=_wanted(names, column)), path, names)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix}: {_first_line(error)}") from error


def read_arrow(data: bytes, path: Path, column: str | None = None) -> Table:
    """The columns of an Arrow file or stream that may be read."""
    pyarrow = _pyarrow(path.name)
    try:
        if data.startswith(b"ARROW1"):
            table = pyarrow.ipc.open_file(pyarrow.BufferReader(data)).read_all()
        else:
            table = pyarrow.ipc.open_stream(pyarrow.BufferReader(data)).read_all()
        names = tuple(table.column_names)
        return _table(table.select(_wanted(names, column) or names), path, names)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix}: {_first_line(error)}") from error


def _wanted(names: tuple[str, ...], column: str | None) -> list[str] | None:
    """The columns to read, if they are known, because the others may be large."""
    chosen = column if column is not None else "text"
    return (
        [name for name in (chosen, "attention_mask", "system", "tools") if name in names] if chosen in names else None
    )


def _table(table: Any, path: Path, names: tuple[str, ...]) -> Table:
    return Table(str(path), table.to_pylist(), columns=names, kind=path.suffix)


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ConfigError(f"reading {name} needs the package pyarrow: pip install 'mxrot[data]'") from error
    return pyarrow


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
