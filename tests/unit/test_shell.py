from __future__ import annotations

import shlex
from pathlib import Path

from mxrot.shell import command, expanded, is_utf8


def test_a_command_is_taken_apart_into_its_words() -> None:
    words = ["mxrot", "eval", "two words", "it's", "$HOME", "a\nb"]
    assert shlex.split(command(*words)) == words
    assert command("mxrot", Path("-x"), "-o") == "mxrot ./-x -o"


def test_homes() -> None:
    assert expanded("~") == Path.home() and expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def test_names_that_are_not_utf8() -> None:
    assert is_utf8("\u00e9") and not is_utf8(Path("\udcff"))
