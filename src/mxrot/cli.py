"""The command `mxrot`. Its commands in `mxrot.commands` are thin: they read options, call mxrot.api, and print.

Exit codes: 0 success, 2 wrong usage or input (one line, no traceback), 143 after SIGTERM, 75 after a time limit, 1 for
any other error (also one line). Until interrupts are handled, one ends in a traceback. The modules imported first are
therefore quick to import.
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

    # OpenMP threads that spin while they wait slow each other down on shared cores: 25 times as slow beside one other
    # process. torch reads the variable when it is loaded, so no module that this one imports may load torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Hide progress bars of other packages beside ours. The packages read the variable when they are loaded.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Hide the log of PyTorch's profiler, which reads the variable when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    _quieten()
    from mxrot.commands.app import app

    try:
        app(prog_name="mxrot")
    finally:
        interrupts.end_at_once()  # Python's shutdown follows, which drops errors with a traceback


def _quieten() -> None:
    """Silence warnings of other packages that are meant for developers, such as torchao's about unneeded extensions."""
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
