"""The output of a failed command: one line for each kind of error, and an exit code.

2 is for a request that the user can change, 1 for the machine, an interrupt, and faults of mxrot, 143 for SIGTERM, 75
for a time limit, which is no error.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from typing import NamedTuple

from mxrot import interrupts
from mxrot.errors import MxrotError, TimeLimitError, notes_of
from mxrot.failures import machine_failure

TRACEBACK = "MXROT_TRACEBACK"
"""An environment variable. If it is set to any value, tracebacks are printed as well."""
LONGEST = 500
"""The most characters of a foreign message, because those of torch can go on for pages."""


class Failure(NamedTuple):
    """The message and the exit code."""

    line: str
    exit_code: int


def failure_of(error: BaseException, kept: str | None = None) -> Failure:
    """The message for an error that ended a command. `kept` describes what an interrupted run leaves to continue
    from."""
    failure = _failure_of(error, kept)
    return failure._replace(line="; ".join([failure.line, *notes_of(error)]))


def _failure_of(error: BaseException, kept: str | None) -> Failure:
    if isinstance(error, KeyboardInterrupt) or (interrupts.arrived() and not isinstance(error, MxrotError)):
        said = str(error) if isinstance(error, interrupts.Interrupted) else "interrupted"
        number = error.number if isinstance(error, interrupts.Interrupted) else interrupts.last_raised()
        goes_on = f"; {kept} are kept, and --resume continues from them" if kept else ""
        return Failure(said + goes_on, interrupts.exit_code(number))
    lacked = machine_failure(error)
    if lacked is not None:
        return Failure(str(lacked), lacked.exit_code)
    if isinstance(error, MxrotError):
        return Failure(str(error), error.exit_code)
    if isinstance(error, OSError):
        return Failure(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1)
    return Failure(f"{_of_nobody(error)}; a fault of mxrot: please report it, with {_report(error)}", 1)


def tell(failure: Failure) -> None:
    """Write it to standard error as one line. Only line breaks are replaced: two spaces can be part of a path."""
    line = " ".join(part.strip() for part in failure.line.splitlines())
    kind = "" if failure.exit_code == TimeLimitError.exit_code else "error: "
    print(f"mxrot: {kind}{line}", file=sys.stderr, flush=True)


def _of_nobody(error: BaseException) -> str:
    """The message for an unexpected error: its kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"unexpected {type(error).__name__}" + (f": {lines[0][:LONGEST].rstrip('.;: ')}" if lines else "")


def _report(error: BaseException) -> str:
    """The place of the traceback."""
    text = "".join(traceback.format_exception(error))
    if os.environ.get(TRACEBACK):
        print(text, file=sys.stderr)
        return "the traceback above"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="mxrot-traceback-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"{' '.join(sys.argv)}\n\n{text}")
    except OSError:
        return f"the traceback that {TRACEBACK}=1 shows"
    return f"the traceback in {file.name}"
