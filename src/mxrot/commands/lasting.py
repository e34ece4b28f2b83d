"""Options of commands that can run for a day."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxrot.commands.options import check_file
from mxrot.errors import ConfigError
from mxrot.watching import Board, JsonLines, Listener, TimeLimit, Watch, check_board, seconds_of

TIME_LIMIT_HELP = "Stop before this time is over, after a finished block, with exit code 75: e.g. 90m, 8h, 1h30m"
TimeLimitOption = Annotated[str | None, typer.Option("--time-limit", metavar="DURATION", help=TIME_LIMIT_HELP)]
METRICS_HELP = "Write one line of JSON for each finished block and each look of tuning"
Metrics = Annotated[Path | None, typer.Option("--metrics", metavar="FILE.jsonl", help=METRICS_HELP)]
BOARD_HELP = "Write the same for TensorBoard, with the package tensorboard"
TensorBoard = Annotated[Path | None, typer.Option("--tensorboard", metavar="DIR", help=BOARD_HELP)]


def chosen_limit(duration: str | None) -> TimeLimit | None:
    """The limit of `--time-limit`, counted from now."""
    return None if duration is None else TimeLimit(seconds_of(duration, "--time-limit"))


def chosen_watch(
    limit: TimeLimit | None, metrics: Path | None, tensorboard: Path | None, output: Path, resume: bool
) -> Watch:
    """The watch of these options. ConfigError if it is impossible. Files are created with the first finished block."""
    check_file("--metrics", metrics)
    for option, path in (("--metrics", metrics), ("--tensorboard", tensorboard)):
        if path is not None and path.absolute().is_relative_to(output.absolute()):
            raise ConfigError(f"{option} {path}: is in the output folder, which is made at the end; name another place")
    listeners: list[Listener] = []
    if metrics is not None:
        listeners.append(JsonLines(metrics, resume))
    if tensorboard is not None:
        check_board(tensorboard, "--tensorboard")
        listeners.append(Board(tensorboard))
    return Watch(limit, listeners)
