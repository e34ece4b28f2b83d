"""Interrupts that end a run early: Ctrl-C, SIGTERM and SIGHUP. They differ only in the exit code.

An interrupt is raised as a KeyboardInterrupt, so that half-written files are removed and finished blocks are kept.
There are two exceptions. While modules are imported, nothing is half written, and compiled code may swallow an
exception or turn it into another. The process then ends at once. safetensors calls Python from compiled code. An
interrupt there would become a ValueError about the object being built, and the run would end as if a file were damaged.
The interrupt therefore waits.

Only the command line turns this on. A program that imports mxrot keeps its own handlers. This module imports only
modules that are quick to import, because an interrupt before it is loaded is a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import time

TYPE_CHECKING = False  # typing takes longer to import than all of this module
if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
EXIT_CODE = 1
TERMINATED = 128 + signal.SIGTERM
"""143. Batch systems take it for the end that they requested, not for a failure of the job."""
ECHO_SECONDS = 1.0
"""A wrapper may pass on an interrupt that the terminal has already sent. Within this time it counts as the same one."""
AFTERMATH_SECONDS = 10.0


class Interrupted(KeyboardInterrupt):
    """An interrupt. The message is shown to the user."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__("interrupted" if number == signal.SIGINT else f"interrupted by {name}")
        self.number = number


def exit_code(number: int | None) -> int:
    """The exit code of a process that this signal has ended."""
    return TERMINATED if number == signal.SIGTERM else EXIT_CODE


_raised_at: float | None = None
_raised: int | None = None
"""The signal of the last raised interrupt."""
_waiting = 0
"""The number of open `interrupt_waits`."""
_noted: int | None = None
"""The signal of the waiting interrupt."""


def arrived() -> bool:
    """True if an interrupt was raised just now. An error that follows may be caused by it."""
    return _raised_at is not None and time.monotonic() - _raised_at < AFTERMATH_SECONDS


def last_raised() -> int | None:
    """The signal of the last interrupt that was raised."""
    return _raised


def end_at_once() -> None:
    """From now on an interrupt writes one line and ends the process with its exit code, without any cleanup."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores a signal
            signal.signal(number, _end)


def raise_interrupts() -> None:
    """From now on an interrupt is raised as `Interrupted` in the main thread. A later one ends the process.

    This works only after a call of `end_at_once`.
    """
    taken = [number for number in SIGNALS if signal.getsignal(number) is _end]
    for number in taken:
        signal.signal(number, _raise)
    if taken:
        sys.unraisablehook = _again


def _end(number: int, frame: FrameType | None) -> None:
    clear = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # clears a progress bar, which hides the cursor
    os.write(2, f"{clear}mxrot: error: {Interrupted(number)}\n".encode())
    os._exit(exit_code(number))


def _raise(number: int, frame: FrameType | None) -> None:
    global _raised_at, _raised, _noted
    if _waiting:
        _noted = number
    elif _raised_at is None:
        _raised_at, _raised = time.monotonic(), number
        raise Interrupted(number)
    elif time.monotonic() - _raised_at > ECHO_SECONDS:
        _end(number, frame)


def _again(lost: Any) -> None:
    """Replaces sys.unraisablehook. An interrupt that was raised where Python drops errors is raised again soon."""
    global _raised_at
    if not isinstance(lost.exc_value, Interrupted):
        sys.__unraisablehook__(lost)
        return
    import threading

    _raised_at = None
    threading.Timer(0.05, signal.raise_signal, (lost.exc_value.number,)).start()


class interrupt_waits:  # noqa: N801 (used as a function is; contextlib would take longer to import than this module)
    """While open, an interrupt waits. It is raised at the end, even in place of an error. For short work only.

    Does nothing outside the main thread, which no interrupt reaches, or if other code handles interrupts.
    """

    def __enter__(self) -> None:
        global _waiting
        self._arrived = self._counts = self._replaces = False
        if not _is_main_thread():
            return
        handler = signal.getsignal(signal.SIGINT)
        if handler is _raise:
            self._counts = True
            _waiting += 1
        elif handler is signal.default_int_handler:
            self._replaces = True
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        global _waiting, _noted
        if self._counts:
            _waiting -= 1
            if _noted is not None and not _waiting:
                number, _noted = _noted, None
                _raise(number, None)
        elif self._replaces:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._arrived:
                raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived = True


def _is_main_thread() -> bool:
    threading = sys.modules.get("threading")  # if it is not imported, there is only one thread
    return threading is None or threading.current_thread() is threading.main_thread()
