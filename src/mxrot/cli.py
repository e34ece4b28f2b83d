"""The command `mxrot`. Its commands are in `mxrot.commands`, thin: they read options, call mxrot.api, and print.

Exit codes: 0 done, 2 bad usage or bad input (one line, no traceback), 143 after SIGTERM, 75 after a
time limit, 1 anything else (one line, too).
Until an interrupt is taken care of it ends in a traceback; so what comes first here is quick to import.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    """Entry point of the command `mxrot`."""
    try:
        from mxrot import interrupts

        interrupts.end_at_once()
    except KeyboardInterrupt:
        raise SystemExit("mxrot: error: interrupted") from None
    import os

    # Threads that spin while they wait for one another stand still where cores are shared: 25 times as slow beside
    # one other process. Read when torch is loaded, so no module that this one imports may load it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Bars of other packages, which show beside ours; read when they are loaded.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _quieten()
    from mxrot.commands.app import app

    try:
        app(prog_name="mxrot")
    finally:
        interrupts.end_at_once()  # what is still to come is Python's end, which drops errors with a traceback


def _quieten() -> None:
    """Other packages speak to developers: torchao, where it is installed, warns of extensions it does not need."""
    import logging
    import sys
    import warnings

    logging.disable(logging.WARNING)
    if not sys.warnoptions:
        from mxrot.errors import MxrotWarning

        warnings.simplefilter("ignore")
        warnings.simplefilter("default", MxrotWarning)
        warnings.formatwarning = lambda message, *_: f"mxrot: warning: {message}\n"


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'mxrot.cli' has no attribute {name!r}")
    from mxrot.commands.app import app

    return app


def __dir__() -> list[str]:
    return sorted({*globals(), "app"})


if __name__ == "__main__":
    main()
