"""Events for TensorBoard, by torch.utils.tensorboard, which is imported only if it is used."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mxrot.errors import ConfigError
from mxrot.watching.watch import Event


def check_board(folder: Path, option: str) -> None:
    """ConfigError unless the package tensorboard is installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            f"{option} {folder}: needs the package tensorboard; pip install 'mxrot[tensorboard]', or take --metrics"
        )


class Board:
    """Writes the numbers of each event as scalars: of blocks over the block index, of tuning over its steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def hear(self, event: Event) -> None:
        """Write everything out."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))
        step = event["step"] if "step" in event else event["block"]
        for tag, value in scalars(event):
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def scalars(event: Event) -> Iterator[tuple[str, float]]:
    """Names and numbers. The name of a number in a table begins with that of the table: `block/errors/qkv/weight`."""
    prefix = f"{event['event']}/{event['name']}" if "step" in event else event["event"]
    yield from _numbers(prefix, {key: value for key, value in event.items() if key not in _NOT_DRAWN})


_NOT_DRAWN = ("event", "time", "name", "block", "blocks", "step")


def _numbers(prefix: str, table: Event) -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _numbers(f"{prefix}/{key}", value)
        elif isinstance(value, (int, float)):
            yield f"{prefix}/{key}", float(value)
