"""The documents of a file, or of a folder of files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mxrot.errors import DataError
from mxrot.text.contents import ARROW_MAGIC, PACKED, PARQUET_MAGIC, check_regular, read_bytes, unpacked_name
from mxrot.text.decoding import decode, lone_surrogate
from mxrot.text.document import Document, Origin
from mxrot.text.roles import Role, split_for
from mxrot.text.rows import Table, documents_of
from mxrot.text.tables import read_arrow, read_json, read_parquet, read_separated

PROSE = (".txt", ".text", ".raw", ".md", ".rst", ".log", ".tokens")
"""Suffixes of files that are one document, read unchanged. Files without a suffix are read in the same way."""

_TABLES: dict[str, Callable[[bytes, Path, str | None], Table]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson", ".jsonlines"), read_json),
    ".csv": lambda data, path, _: read_separated(data, path, ","),
    ".tsv": lambda data, path, _: read_separated(data, path, "\t"),
    **dict.fromkeys((".parquet", ".pq"), read_parquet),
    ".arrow": read_arrow,
}
SUFFIXES = (*PROSE, *_TABLES)

Read = tuple[list[Document], Origin]


def suffix_of(path: Path) -> str:
    """The suffix in lower case, without that of a compression. Empty if the file has none."""
    return Path(unpacked_name(path)).suffix.lower()


def is_known(path: Path) -> bool:
    """True if the suffix is that of a text or a table."""
    return suffix_of(path) in SUFFIXES


def read_file(path: Path, column: str | None = None) -> Read:
    """The documents in a file, read by the kind that its name gives.

    DataError, in one line, if it cannot be read, is of another kind, or has an unknown suffix.
    """
    check_regular(path)
    suffix = suffix_of(path)
    if suffix and suffix not in SUFFIXES:
        read_bytes(path)  # raises a better error for a known kind
        raise DataError(
            f"{path}: unknown suffix {suffix}; known are {' '.join(SUFFIXES)}, also compressed ({' '.join(PACKED)}); "
            "give it the one that says what it holds"
        )
    data = read_bytes(path)
    if suffix in _TABLES:
        _check_kind(data, suffix, path)
        return documents_of(_TABLES[suffix](data, path, column), column)
    if column is not None:
        raise DataError(f"{path}: is read as it is, and has no column {column!r}")
    if data.startswith((PARQUET_MAGIC, ARROW_MAGIC)):
        kind = "parquet" if data.startswith(PARQUET_MAGIC) else "Arrow"
        raise DataError(f"{path}: holds {kind}; give it the suffix .{kind.lower()}")
    content = decode(data, path)
    if (half := lone_surrogate(content)) is not None:  # UTF-16 may hold one
        raise DataError(f"{path}: holds {half}, half of a character without its other half")
    return [content], Origin()


def _check_kind(data: bytes, suffix: str, path: Path) -> None:
    """DataError if it is binary and its suffix is that of a text, or the other way round."""
    if suffix in (".parquet", ".pq"):
        if not data.startswith(PARQUET_MAGIC):
            raise DataError(f"{path}: cannot be read as .parquet: it does not begin with PAR1; is the download whole?")
    elif suffix != ".arrow" and data.startswith((PARQUET_MAGIC, ARROW_MAGIC)):
        raise DataError(f"{path}: is a parquet or Arrow file, not {suffix}; give it the suffix that says so")


def read_folder(folder: Path, role: Role, column: str | None = None) -> Read:
    """All texts below a folder, in the order of their paths, or a data set that `save_to_disk` has written there.

    If there are several splits, the one for the role is read. Hidden files and files of unknown suffix are left out;
    the record names the latter. DataError if nothing is left.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _json_object(folder / "dataset_dict.json").get("splits")
        splits = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        return _read_saved(folder / split_for(role, splits, str(folder)), column)
    if (folder / "state.json").is_file():
        return _read_saved(folder, column)
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        raise DataError(f"{folder}: is a model, not a text")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    known = [path for path in paths if is_known(path)]
    others = tuple(path.relative_to(folder).as_posix() for path in paths if not is_known(path))
    if not known:
        raise DataError(f"{folder}: holds no file with a suffix of a text ({' '.join(SUFFIXES)})")
    parts = [read_file(path, column if suffix_of(path) in _TABLES else None) for path in known]
    rows = [origin.rows for _, origin in parts if origin.rows is not None]
    nulls = [
        f"{path.relative_to(folder).as_posix()}: {number}"
        for path, (_, origin) in zip(known, parts, strict=True)
        for number in origin.null_rows
    ]
    origin = Origin(sum(rows) if rows else None, column, tuple(nulls), len(known), others)
    return [document for documents, _ in parts for document in documents], origin


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _read_saved(folder: Path, column: str | None) -> Read:
    """A data set that `save_to_disk` of `datasets` has written: the Arrow files listed in its state.json."""
    listed = _json_object(folder / "state.json").get("_data_files")
    found = [item.get("filename") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    names = [name for name in found if isinstance(name, str) and Path(name).name == name]
    if not names or len(names) < len(found):
        raise DataError(f"{folder / 'state.json'}: names no Arrow files; was it written by save_to_disk?")
    rows: list[Any] = []
    columns: tuple[str, ...] | None = None
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: is missing; state.json names it")
        table = read_arrow(read_bytes(folder / name), folder / name, column)
        rows += table.rows
        columns = table.columns
    return documents_of(Table(str(folder), rows, columns=columns), column)


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: is missing; a data set of save_to_disk has it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: is not an object")
    return found
