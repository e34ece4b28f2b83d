"""What ends a run early: Ctrl-C, SIGTERM and SIGHUP, which end it alike, but for the exit code.

An interrupt is a KeyboardInterrupt, so that what is half written is taken away and finished blocks are kept. There are
two times at which that is no way out. While modules are imported nothing is half written, and compiled code may swallow
an exception or make another of it: the process ends at once. And safetensors calls Python from compiled code; an
interrupt that arrives there comes out as a ValueError about whatever was being built, and the run would end as if a
file were damaged: it waits.

The command line asks for this; a program that imports mxrot keeps its own handlers. Only what is quick to import is
imported here: until it is, an interrupt is a traceback.
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
"""143, which batch systems take for what they asked for, and not for a failure of the job."""
ECHO_SECONDS = 1.0
"""Wrappers hand on what the terminal has sent already: the same interrupt, once more."""
AFTERMATH_SECONDS = 10.0


class Interrupted(KeyboardInterrupt):
    """An interrupt; the message is what a person is told."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__("interrupted" if number == signal.SIGINT else f"interrupted by {name}")
        self.number = number


def exit_code(number: int | None) -> int:
    """Of a process that this signal has ended."""
    return TERMINATED if number == signal.SIGTERM else EXIT_CODE


_raised_at: float | None = None
_raised: int | None = None
"""The signal of that time."""
_waiting = 0
"""How many `interrupt_waits` are open."""
_noted: int | None = None
"""The signal that waits."""


def arrived() -> bool:
    """Was an interrupt raised just now? An error that comes then may be what somebody made of it."""
    return _raised_at is not None and time.monotonic() - _raised_at < AFTERMATH_SECONDS


def last_raised() -> int | None:
    """The signal of the interrupt that was raised last."""
    return _raised


def end_at_once() -> None:
    """From now on an interrupt writes one line and ends the process with its exit code, without any cleaning up."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _end)


def raise_interrupts() -> None:
    """From now on an interrupt is raised as `Interrupted` in the main thread; another one, later, ends the process.

    Only where `end_at_once` was asked for before.
    """
    taken = [number for number in SIGNALS if signal.getsignal(number) is _end]
    for number in taken:
        signal.signal(number, _raise)
    if taken:
        sys.unraisablehook = _again


def _end(number: int, frame: FrameType | None) -> None:
    clear = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # a bar, which hides the cursor
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
    """In place of sys.unraisablehook: an interrupt that was raised where Python drops errors is raised again, soon."""
    global _raised_at
    if not isinstance(lost.exc_value, Interrupted):
        sys.__unraisablehook__(lost)
        return
    import threading

    _raised_at = None
    threading.Timer(0.05, signal.raise_signal, (lost.exc_value.number,)).start()


class interrupt_waits:  # noqa: N801 (used as a function is; contextlib would take longer to import than this module)
    """While open, an interrupt waits; it is raised at the end, also in place of an error. For short work only.

    Does nothing outside of the main thread, which no interrupt reaches, or where somebody else handles interrupts.
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
    threading = sys.modules.get("threading")  # where nobody imported it there is one thread
    return threading is None or threading.current_thread() is threading.main_thread()
