from pathlib import Path

import pytest

from mxrot.errors import DataError
from mxrot.text.decoding import decode, lone_surrogate, without_marks

HERE = Path("some/text.txt")
PROSE = "Ein Käfer, “zwei” Käfer. "


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_says_its_encoding_is_read(encoding: str) -> None:
    assert decode(PROSE.encode(encoding), HERE) == PROSE


@pytest.mark.parametrize(("mark", "encoding"), [(b"\xfe\xff", "utf-16-be"), (b"\0\0\xfe\xff", "utf-32-be")])
def test_marks_of_the_other_byte_order(mark: bytes, encoding: str) -> None:
    assert decode(mark + PROSE.encode(encoding), HERE) == PROSE


def test_line_ends_are_those_of_text_mode(tmp_path: Path) -> None:
    data = b"a\r\nb\rc\nd\n\re\xe2\x80\xa8f\x0bg\x1c"
    (tmp_path / "text").write_bytes(data)
    assert decode(data, HERE) == (tmp_path / "text").read_text(encoding="utf-8")


def test_only_marks_where_files_begin_are_removed() -> None:
    assert without_marks("\ufeffone\n\ufefftwo \ufeff three") == "one\ntwo \ufeff three"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PROSE.encode("cp1252"), "WINDOWS-1252"),
        ("Käfer".encode("latin-1"), "LATIN1"),
        (("plain " * 9).encode("utf-16-le"), "UTF-16LE without a byte order mark"),
        (("plain " * 9).encode("utf-16-be"), "UTF-16BE without a byte order mark"),
        (("plain " * 9).encode("utf-32-le"), "UTF-32LE without a byte order mark"),
        ("бумага ".encode("koi8-r") * 9, "another script"),
        (b"a\0b" * 9, "zero bytes"),
        (b"plain \x01\x02\x03\x04 \xff", "binary data"),
        (b"\xef\xbb\xbfabc\xff", "begins as utf-8, but is not that to its end"),
        (b"\xff\xfea", "begins as utf-16-le, but is not that to its end"),
    ],
)
def test_what_bytes_look_like_is_said(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        decode(data, HERE)
    assert str(raised.value).startswith("some/text.txt: ") and "\n" not in str(raised.value)


def test_the_line_of_the_first_bad_byte() -> None:
    with pytest.raises(DataError, match=r"byte 0xfc in line 3"):
        decode(b"one\ntwo\nthr\xfce\n", HERE)


def test_lone_surrogates() -> None:
    assert lone_surrogate("a\ud800b") == "\\ud800"
    assert lone_surrogate("\U0001f600 and ä") is None
