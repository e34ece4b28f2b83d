"""Lines for a terminal are broken between words; a file gets them whole."""

from __future__ import annotations

import os
import sys

import pytest

from mxrot.commands.lines import say

LONG = "size: " + "0.269 GB before, " * 8


def test_a_terminal_gets_lines_that_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((50, 24)))
    say(f"  {LONG}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2 and all(len(line) <= 50 for line in lines)
    assert lines[0].startswith("  size:") and all(line.startswith("    ") for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == LONG.strip()
    path = "/a/very-long-path/" * 5
    say(path)
    assert capsys.readouterr().out == f"{path}\n"


def test_a_file_gets_the_line_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say(LONG)
    assert capsys.readouterr().out == f"{LONG}\n"
