"""The bytes of a text file: opens and unpacks it, and refuses files that hold no text, by name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mxrot.errors import ConfigError, DataError

PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Suffixes of compressed files, and the names of the compressions."""

_PACKED_BY: dict[bytes, str] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_OTHERS: dict[bytes, str] = {
    b"%PDF": "a PDF; take the text out of it first (pdftotext)",
    b"PK\x03\x04": "a zip archive (as .docx and .epub are); unpack it and name the text or the folder",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it and name the text or the folder",
    b"Rar!": "a rar archive; unpack it and name the text or the folder",
    b"GGUF": "a GGUF model, not a text",
    b"\x89PNG": "a picture, not a text",
    b"\xff\xd8\xff": "a picture, not a text",
    b"GIF8": "a picture, not a text",
    b"SQLite format 3": "an SQLite database; export the text from it",
    b"\x7fELF": "a program, not a text",
    b"\xd0\xcf\x11\xe0": "an old Office file; save it as text",
    b"{\\rtf": "an RTF file; save it as text",
    b"version https://git-lfs.github.com/spec/": "a git-lfs pointer in place of the file; fetch it: git lfs pull",
}
_HTML = (b"<!doctype html", b"<html")
_TAR_MAGIC = slice(257, 262)
PARQUET_MAGIC, ARROW_MAGIC = b"PAR1", b"ARROW1"


def check_regular(path: Path) -> None:
    """DataError unless it is a regular file. A pipe or a device cannot be read to its end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is not a regular file (a pipe, a socket or a device); write the text into a file")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read: permission denied")


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, unpacked if they are compressed, whatever the name of the file.

    DataError if it is damaged, or of a kind without text: PDF, archives, pictures, HTML, git-lfs pointers.
    """
    check_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    packing = next((name for magic, name in _PACKED_BY.items() if data.startswith(magic)), None)
    if packing is not None:
        data = _unpacked(data, packing, path)
    elif data and path.suffix.lower() in PACKED:
        _refuse_other_kinds(data, path)
        raise DataError(
            f"{path}: is not the {PACKED[path.suffix.lower()]} file that its name says; is the download whole?"
        )
    _refuse_other_kinds(data, path)
    return data


def unpacked_name(path: Path) -> str:
    """The file name without its compression suffix."""
    return path.name[: -len(path.suffix)] if path.suffix.lower() in PACKED else path.name


def _unpacked(data: bytes, packing: str, path: Path) -> bytes:
    try:
        return _UNPACK[packing](data)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise DataError(f"{path}: damaged {packing} data ({error}); is the download whole?") from error


def _unpack_zstd(data: bytes) -> bytes:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError("reading .zst needs the package pyarrow: pip install 'mxrot[data]'") from error
    source: Any = pyarrow.CompressedInputStream(io.BytesIO(data), "zstd")
    return bytes(source.read())


_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.decompress,
    "bzip2": bz2.decompress,
    "xz": lzma.decompress,
    "zstd": _unpack_zstd,
}


def _refuse_other_kinds(data: bytes, path: Path) -> None:
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, what in _OTHERS.items():
        if data.startswith(magic):
            raise DataError(f"{path}: is {what}")
    if data[_TAR_MAGIC] == b"ustar":
        raise DataError(f"{path}: is a tar archive; unpack it and name the text or the folder")
    if start.lower().startswith(_HTML):
        raise DataError(f"{path}: is an HTML page (of a download that failed?), not a text")
