"""The command `mxrot` in children of this process, which has loaded what is slow to load: a fifth of a second each.

A child is given over to a fault before the command starts. It is forked while this process has one thread; so a
script that uses this module is a process of its own, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401
from tests.tiny_model import write_tiny_model

from mxrot import api, cli, report  # noqa: F401
from mxrot.commands import app  # noqa: F401

RECIPES: dict[str, list[str]] = {
    "rtn": [],
    "duquant++-gptq": ["transform.steps=4"],
    "mxrot": ["calibration.generated=0.5"],
    "mxrot-tuned": [
        "calibration.generated=0",
        "tuning.generated=0",
        "tuning.steps=6",
        "tuning.batch_windows=2",
        "tuning.held_out=0.5",
    ],
}
"""Recipes, with changes that make them quick."""
TRACEBACK = 99
FOREIGN = ("out.replaced/model.safetensors", "out.partial.mine/fingerprint.json", "out.partial.tmp", "other.partial/a")
"""What somebody else has beside an output, each with a name much like one of ours."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Its exit code, or less a signal's number."""
    text: str
    seconds: float


def start(words: list[str], log: Path, fault: Callable[[], None] | None = None) -> int:
    """Begin `mxrot WORDS` in a child that has called `fault`; its number. What it writes goes to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = TRACEBACK
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["mxrot", *words]
        if fault is not None:
            fault()
        code = _run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _run() -> int:
    try:
        cli.main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def wait(child: int, log: Path, started: float) -> Ended:
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), time.monotonic() - started)


def run(words: list[str], log: Path, fault: Callable[[], None] | None = None) -> Ended:
    """`start`, and wait for its end."""
    started = time.monotonic()
    return wait(start(words, log, fault), log, started)


@dataclass
class Workshop:
    """A folder with a model, an output to be made, and what other people have beside it."""

    folder: Path

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.folder.mkdir(parents=True)
        self.model = write_tiny_model(self.folder / "model")
        self.log = self.folder / "log"
        self.place = self.folder / "place"
        self.place.mkdir()
        self.output = self.place / "out"
        self.clear()
        self.foreign = self.look_at_foreign()
        self._wanted: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}

    def words(self, recipe: str, *more: str) -> list[str]:
        """The command that makes the output."""
        changes = [word for change in RECIPES[recipe] for word in ("--set", change)]
        text = ["--samples", "4", "--seq-len", "64", "--device", "cpu"]
        return ["quantize", str(self.model), "-o", str(self.output), "-r", recipe, *text, *changes, *more]

    def clear(self, old: str | None = None) -> None:
        """An empty place but for what is foreign; with the result of the recipe `old` as the output."""
        shutil.rmtree(self.place)
        for name in FOREIGN:
            path = self.place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name} of somebody else")
        if old is not None:
            shutil.copytree(self.folder / f"wanted-{old}", self.output)

    def look_at_foreign(self) -> dict[str, str]:
        """The foreign files as they are now."""
        names = [name for name in FOREIGN if (self.place / name).is_file()]
        return {name: (self.place / name).read_text() for name in names}

    def wanted(self, recipe: str) -> dict[str, bytes]:
        """The bytes that nobody disturbed."""
        if recipe not in self._wanted:
            self.clear()
            ended = run(self.words(recipe), self.log)
            if ended.code:
                raise RuntimeError(f"{recipe} fails by itself: {ended.text}")
            self.seconds[recipe] = ended.seconds
            shutil.copytree(self.output, self.folder / f"wanted-{recipe}")
            self._wanted[recipe] = contents(self.output)
        return self._wanted[recipe]

    def leftovers(self) -> list[str]:
        """What is in the place that is neither the output nor foreign."""
        known = {name.partition("/")[0] for name in FOREIGN} | {"out"}
        return sorted(path.name for path in self.place.iterdir() if path.name not in known)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name; of run.json only what says how the bytes came about, for it holds times."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "run.json"}


class Events:
    """Counts what a process does to the files below a folder, and calls `act` at one of them.

    Opening, making, renaming and removing are seen through Python's audit events, before they happen; writing through
    the files that `io.open` gives.
    """

    KINDS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")

    def __init__(self, folder: Path, at: int, act: Callable[[], None], writes_only: bool = False) -> None:
        self.folder, self.at, self.act, self.writes_only = str(folder), at, act, writes_only
        self.count = 0
        self._busy = False

    def install(self) -> None:
        sys.addaudithook(self._hook)
        io.open = self._open  # type: ignore[assignment] (pathlib opens by this name)

    def _see(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            self.count += 1
            if self.count == self.at or (self.writes_only and self.count > self.at):
                self.act()
        finally:
            self._busy = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in self.KINDS or not arguments or not str(arguments[0]).startswith(self.folder):
            return
        if self.writes_only and not self._takes_room(event, arguments):
            return
        self._see()

    @staticmethod
    def _takes_room(event: str, arguments: tuple[Any, ...]) -> bool:
        """Opened for writing, or a new folder: a rename within a folder needs no room."""
        return event == "os.mkdir" or (event == "open" and bool(int(arguments[2] or 0) & os.O_CREAT))

    def _open(self, file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if not str(file).startswith(self.folder) or not set(mode) & set("wax+") or "b" not in mode:
            return _OPEN(file, mode, *arguments, **keywords)
        return io.BufferedWriter(_Written(os.fspath(file), mode.replace("b", ""), self._see))


_OPEN = io.open


class _Written(io.FileIO):
    """A file that tells of each write."""

    def __init__(self, path: str, mode: str, see: Callable[[], None]) -> None:
        super().__init__(path, mode)
        self._tell_write = see

    def write(self, data: Any) -> int:
        self._tell_write()
        return super().write(data)


def send(number: int) -> None:
    """A signal to this very process."""
    os.kill(os.getpid(), number)
    if number != signal.SIGKILL:
        time.sleep(0)  # a moment at which Python looks for signals
