"""The common behaviour of a command in each of several processes: one prints, and the first reads before the others."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from typing import TYPE_CHECKING

from mxrot.progress import Progress, silent

if TYPE_CHECKING:  # imports torch, which takes longer than a command that is refused
    from mxrot.calibration import World


@contextmanager
def looks(world: World) -> Iterator[None]:
    """The first process runs the body before the others, which then find the fetched or created files. The others print
    nothing to standard error."""
    quiet = redirect_stderr(io.StringIO()) if world.rank else nullcontext()
    with world.first_goes_ahead(), quiet:
        yield


def own_device(world: World, device: str | None) -> str | None:
    """The device of this process, from `--device`."""
    return device if world.device is None else str(world.device)


def told(world: World, title: str, task: str, heartbeat: float | None = None) -> AbstractContextManager[Progress]:
    """The progress on standard error, from the first process."""
    if world.rank:
        return nullcontext(silent)
    from mxrot.report import progress_on_stderr

    return progress_on_stderr(title, task) if heartbeat is None else progress_on_stderr(title, task, heartbeat)
