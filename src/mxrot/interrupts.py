"""Keep Ctrl-C out of code that would turn it into another error.

safetensors calls Python from compiled code; an interrupt that arrives there comes out as a ValueError about whatever
was being built, and the run would end as if a file were damaged.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupt_waits() -> Iterator[None]:
    """While open, an interrupt waits; it is raised at the end, also in place of an error. For short work only.

    Does nothing outside of the main thread, which no interrupt reaches, or where somebody else handles interrupts.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    arrived = False

    def note(number: int, frame: Any) -> None:
        nonlocal arrived
        arrived = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if arrived:
            raise KeyboardInterrupt
