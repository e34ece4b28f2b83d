"""Bytes to text, by UTF-8 or a byte order mark. No encoding is guessed, but the error names the likely one."""

from __future__ import annotations

import codecs
from pathlib import Path

from mxrot.errors import DataError

MARK = "\ufeff"
# The marks of UTF-32 first: one begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LOOKED_AT = 4096


def decode(data: bytes, path: Path) -> str:
    """The text of a file, without byte order marks, and with \\n for every line end.

    DataError if it is not UTF-8 and has no mark. The error names the likely encoding, and the remedy.
    """
    kind = path.suffix.lower() or "text"
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if mark:
            raise DataError(f"{path}: begins as {encoding}, but is not that to its end ({error.reason})") from error
        raise DataError(f"{path}: cannot be read as {kind}: {_not_utf8(data, error.start, path)}") from error
    if "\0" in text[:_LOOKED_AT] and not mark:
        raise DataError(f"{path}: cannot be read as {kind}: {_with_zeros(data, path)}")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return without_marks(text)


def without_marks(text: str) -> str:
    """`text` without byte order marks. They stand at the start of a file, also inside if files were joined."""
    return text.removeprefix(MARK).replace("\n" + MARK, "\n") if MARK in text else text


def lone_surrogate(text: str) -> str | None:
    """A lone surrogate of the text, escaped. None if the text can be written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def _not_utf8(data: bytes, position: int, path: Path) -> str:
    zeros = data[:_LOOKED_AT].count(0)
    if zeros:
        return _with_zeros(data, path)
    line = data.count(b"\n", 0, position) + 1
    where = f"not utf-8 (byte 0x{data[position]:02x} in line {line})"
    high = sum(byte >= 0x80 for byte in data[:_LOOKED_AT])
    if high > 0.3 * len(data[:_LOOKED_AT]):
        return (
            f"{where}; it looks like an older encoding of another script (GB18030, Shift_JIS, KOI8-R, ...), or like "
            f"binary data; convert text with: iconv -f ENCODING -t UTF-8 {path.name}"
        )
    control = sum(byte < 0x20 and byte not in b"\t\n\r\f\x1b" for byte in data[:_LOOKED_AT])
    if control:
        return f"{where}, and control characters; it looks like binary data, not like a text"
    name = "WINDOWS-1252" if any(0x80 <= byte < 0xA0 for byte in data) else "LATIN1"
    return f"{where}; it looks like {name}; convert it with: iconv -f {name} -t UTF-8 {path.name}"


def _with_zeros(data: bytes, path: Path) -> str:
    """The likely content of bytes with zeros among them, in words."""
    looked_at = data[: _LOOKED_AT // 4 * 4]
    even, odd = looked_at[::2].count(0), looked_at[1::2].count(0)
    most, half = max(even, odd), len(looked_at) / 2
    if most > 0.3 * half and min(even, odd) < 0.05 * half:
        name = "UTF-16LE" if odd > even else "UTF-16BE"
        return f"it looks like {name} without a byte order mark; convert it with: iconv -f {name} -t UTF-8 {path.name}"
    if even + odd > 0.6 * len(looked_at) and min(looked_at[::4].count(0), looked_at[3::4].count(0)) == 0:
        name = "UTF-32LE" if looked_at[3::4].count(0) else "UTF-32BE"
        return f"it looks like {name} without a byte order mark; convert it with: iconv -f {name} -t UTF-8 {path.name}"
    return "it holds zero bytes, and looks like binary data, not like a text"
