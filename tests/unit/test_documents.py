"""Documents that others wrote: what JSON is, and what is refused in one short line."""

import os
from pathlib import Path

import pytest

from mxrot.documents import parse_json, read_json, read_text
from mxrot.errors import MOST_CHARACTERS, CheckpointError, ConfigError, DamagedError, FamilyError

REFUSED = {
    "": "not JSON",
    "{": "not JSON",
    "[1]": "expected a JSON object",
    "\ufeff{}": "not JSON",
    '{"a": 1, "a": 2}': "the key 'a' is there twice",
    '{"a": {"b": 1, "b": 1}}': "the key 'b' is there twice",
    f'{{"a": {"9" * 400}}}': "a number of 400 digits",
    f'{{"a": {"9" * 5000}}}': "a number of 5000 digits",
    '{"a": 1e999}': "too long or too large",
    '{"a": NaN}': "NaN is no number",
    '{"a": ' * 100 + "1" + "}" * 100: "nested deeper than 64 levels",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=[text[:12] for text in REFUSED])
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("utf-8"))
    with pytest.raises(DamagedError, match=message) as raised:
        read_json(tmp_path / "x.json")
    assert isinstance(raised.value, FamilyError) and isinstance(raised.value, CheckpointError)


def test_what_is_read() -> None:
    table = {"a": 1, "b": [1e-5, None, True], "c": {"d": "ü"}, "e": 10**30, "f": float("inf")}
    text = '{"a": 1, "b": [1e-5, null, true], "c": {"d": "ü"}, "e": 1' + "0" * 30 + ', "f": Infinity}'
    assert parse_json(text, "x") == table
    deep = '{"a": ' * 64 + "1" + "}" * 64
    assert list(parse_json(deep, "x")) == ["a"]


def test_other_encodings_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Jürgen".encode("latin-1"))
    with pytest.raises(DamagedError, match=r"latin: not UTF-8 text \(byte 1: "):
        read_text(tmp_path / "latin")
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
        with pytest.raises(DamagedError, match=f"is {kind}; expected a regular file"):
            read_text(path)
    with pytest.raises(DamagedError, match=r"none: cannot be read \(No such file or directory\)"):
        read_text(tmp_path / "none")
    with pytest.raises(DamagedError, match="not the name of a file"):
        read_text(tmp_path / "a\0b")


def test_a_message_is_one_line_of_bounded_length_that_any_terminal_shows() -> None:
    error = str(ConfigError("a\nb\x1b[31m\ud800 " + "x" * 100_000 + " the end"))
    assert error.startswith("a b\\x1b[31m\\ud800 x") and error.endswith("x the end")
    assert len(error) < MOST_CHARACTERS + 100
    error.encode("utf-8")
