"""What a command says of an error that nobody foresaw, and of an interrupt that came out as another error."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from mxrot import interrupts
from mxrot.commands.failures import failure_of
from mxrot.errors import ConfigError


def raised(error: BaseException) -> BaseException:
    """The error, with a traceback."""
    try:
        raise error
    except BaseException as found:
        return found


def test_what_nobody_foresaw_is_a_line_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MXROT_TRACEBACK", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    line, code = failure_of(raised(ZeroDivisionError("division by zero\nand more")))
    (file,) = tmp_path.iterdir()
    assert (
        code == 1 and str(file) in line and "unexpected ZeroDivisionError: division by zero; a fault of mxrot" in line
    )
    assert "Traceback" in file.read_text() and "and more" in file.read_text()


def test_where_no_file_can_be_written_it_says_how_to_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MXROT_TRACEBACK", raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    assert "MXROT_TRACEBACK=1" in failure_of(raised(KeyError())).line


def test_the_variable_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MXROT_TRACEBACK", "1")
    assert failure_of(raised(ValueError("x"))).line.endswith("with the traceback above")
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interrupt_that_became_another_error_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "arrived", lambda: True)
    assert failure_of(ImportError("initialization failed"), "finished blocks").line.startswith("interrupted; finished")
    assert failure_of(ConfigError("recipe")) == ("recipe", 2)


def test_only_sigterm_has_a_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it came out as another error."""
    codes = {number.name: failure_of(interrupts.Interrupted(number)).exit_code for number in interrupts.SIGNALS}
    assert codes == {"SIGINT": 1, "SIGTERM": 143, "SIGHUP": 1} and failure_of(KeyboardInterrupt()).exit_code == 1
    monkeypatch.setattr(interrupts, "arrived", lambda: True)
    monkeypatch.setattr(interrupts, "_raised", signal.SIGTERM)
    assert failure_of(ImportError("initialization failed")).exit_code == 143
