"""`mxrot quantize` in two processes and in one, whole and with faults: `python -m tests.unit.ranked FOLDER`.

A process of its own, because it forks (tests.faults.forked). What each command left and said goes to outcomes.json.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.faults.forked import Ended, start
from tests.tiny_model import write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import digests, without_run
from torch import Tensor

from mxrot import ranks
from mxrot.checkpoint.noted import NotedTensors
from mxrot.errors import NumericsError
from mxrot.quantizing import batches
from mxrot.quantizing import run as pipeline
from mxrot.tuning import loop

LENGTH = 32
MOST_SECONDS = 60.0
Fault = Callable[[], None]
FEW = ("--set", "tuning.held_out=0.2", "--set", "calibration.generated=0")


def main(folder: Path) -> None:
    """Every scenario after the other."""
    found: dict[str, object] = {}
    write_tiny_model(folder / "tiny")
    write_tiny_mixture(folder / "experts", "mixtral")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)

    def outcome(name: str, size: int, output: str, faults: dict[int, Fault] | None = None, *more: str) -> None:
        model = "experts" if "experts" in output else "tiny"
        words = ["quantize", str(folder / model), "-o", str(folder / output), "--calib", str(folder / "text.txt")]
        words += ["--samples", "16", "--seq-len", str(LENGTH), *more]
        found[name] = [asdict(one) for one in commands(folder, words, size, faults or {})]

    for model in ("tiny", "experts"):
        outcome(f"one {model}", 1, f"one-{model}")
        files = ["--json", str(folder / f"{model}.json"), "--metrics", str(folder / f"{model}.jsonl")]
        outcome(f"two {model}", 2, f"two-{model}", {1: touch_nothing}, *files)
    outcome("again", 2, "again")
    outcome("raised", 2, "raised", {1: partial(at_second_block, raise_)})
    for rank in (0, 1):
        outcome(f"killed {rank}", 2, f"killed-{rank}", {rank: partial(at_second_block, kill)})
    shutil.copytree(folder / "killed-1.partial", folder / "fewer.partial")
    for name, size, output in (("resumed", 2, "killed-1"), ("resumed by one", 1, "fewer")):
        outcome(name, size, output, None, "--resume")
    outcome("stopped", 2, "stopped", {0: hasten, 1: partial(at_second_block, stop)})
    outcome("refused", 2, "refused", None, "--recipe", "spinquant")
    outcome("taken", 2, "again")
    outcome("rtn", 2, "rtn", None, "--recipe", "rtn")
    outcome("finished", 2, "rtn", None, "--recipe", "rtn", "--resume")
    outcome("ended", 2, "ended", {0: partial(end_soon, signal.SIGTERM), 1: partial(at_second_block, kill)})
    for name, (more, fault) in TUNED.items():
        outcome(f"tuned {name}", 2, f"tuned-{name}", None, *more)
        outcome(f"tuned {name} killed", 2, f"tuned-{name}-killed", {1: fault}, *more)
        shutil.copytree(folder / f"tuned-{name}-killed.partial", folder / f"tuned-{name}-fewer.partial")
        outcome(f"tuned {name} by one", 1, f"tuned-{name}-fewer", None, *more, "--resume")
        outcome(f"tuned {name} resumed", 2, f"tuned-{name}-killed", None, *more, "--resume")
    network = TUNED["network"][0]
    outcome("tuned over", 2, "tuned-over", {0: save_slowly}, *network, "--time-limit", "1s")
    found["kept"] = sorted(path.name for path in (folder / "tuned-over.partial").iterdir())
    outcome("tuned over resumed", 2, "tuned-over", None, *network, "--resume")
    found["bytes"] = {
        name: without_run(digests(folder / name))
        for name in ("two-tiny", "again", "killed-1", *(path.name for path in folder.glob("tuned-*")))
        if (folder / name).is_dir()
    }
    (folder / "outcomes.json").write_text(json.dumps(found))


def made_by(module: str, folder: Path) -> Path:
    """`folder`, with what the scenarios of such a module have left there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", module, str(folder)], check=True, env=environment, timeout=600)
    return folder


def read_outcomes(folder: Path) -> dict[str, Any]:
    """How each command has ended."""
    found: dict[str, Any] = json.loads((folder / "outcomes.json").read_text())
    return found


def commands(folder: Path, words: list[str], size: int, faults: dict[int, Fault]) -> list[Ended]:
    """`mxrot WORDS` in so many processes; how each has ended, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    logs = [folder / f"rank-{rank}.log" for rank in range(size)]
    going = {
        start(words, log, partial(as_rank, rank, size, port, faults.get(rank))): rank for rank, log in enumerate(logs)
    }
    ended: dict[int, Ended] = {}
    while going:
        for child, rank in list(going.items()):
            if time.monotonic() - begun > MOST_SECONDS or (len(going) == 1 and is_stopped(child)):
                os.kill(child, signal.SIGKILL)
            gone, status = os.waitpid(child, os.WNOHANG)
            if gone:
                code = os.waitstatus_to_exitcode(status)
                ended[rank] = Ended(code, logs[rank].read_text(errors="replace"), time.monotonic() - begun)
                del going[child]
        time.sleep(0.05)
    return [ended[rank] for rank in range(size)]


def is_stopped(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def as_rank(rank: int, size: int, port: int, fault: Fault | None) -> None:
    """What torchrun does for a process. With one window a batch, what is computed of it has the same bits in both."""
    batches.BATCH_TOKENS, loop.KEEP_SECONDS = {"cpu": LENGTH}, 0.0
    if size > 1:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in {**place, **numbers}.items()})
    if fault is not None:
        fault()


def at_second_block(fault: Fault) -> None:
    """Let `fault` happen once the first block is finished."""
    original = pipeline.quantize_block

    def quantize_block(run: object, index: int, *rest: object) -> object:
        if index == 1:
            fault()
        return original(run, index, *rest)  # type: ignore[arg-type]

    pipeline.quantize_block = quantize_block  # type: ignore[assignment]


def touch_nothing() -> None:
    """Let this process not try whether it could write a file: another one may be trying the same."""

    def touch(path: Path) -> None:
        raise PermissionError(f"{path} is for the first process")

    Path.touch = touch  # type: ignore[assignment, method-assign]


def at_fourth_step() -> None:
    """Kill this process in tuning."""
    original, count = torch.optim.Adam.step, itertools.count(1)

    def step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if next(count) == 4:
            kill()
        return original(self, *arguments, **keywords)

    torch.optim.Adam.step = step  # type: ignore[method-assign]


def save_slowly() -> None:
    """Let the state of tuning take longer to keep than others wait for a process that has failed."""
    original = NotedTensors.save

    def save(self: NotedTensors, tensors: dict[str, Tensor]) -> None:
        if "checks" in tensors:
            time.sleep(2 * ranks.GRACE_SECONDS + 3)
        original(self, tensors)

    NotedTensors.save = save  # type: ignore[method-assign]


def raise_() -> None:
    raise NumericsError("model.layers.1: of this process alone")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def end_soon(number: int) -> None:
    """Send a signal while this process finds out who was killed, as torchrun does."""
    original = ranks._Watch._lost

    def lost(watch: ranks._Watch) -> ranks.RankError:
        os.kill(os.getpid(), number)
        return original(watch)

    ranks._Watch._lost = lost  # type: ignore[method-assign]


def hasten() -> None:
    ranks.LOST_SECONDS = 3.0
    ranks.GRACE_SECONDS = 1.0


OF_BLOCK = "--set", "tuning.steps=3", "--set", "tuning.checks=1"
OF_NETWORK = (
    *("--set", "tuning.steps=6", "--set", "tuning.checks=3", "--set", "tuning.patience=6"),
    *("--set", "tuning.generated=0.5"),
)
TUNED: dict[str, tuple[tuple[str, ...], Fault]] = {
    "block": (("--recipe", "duquant-lwc", *OF_BLOCK, *FEW), partial(at_second_block, kill)),
    "network": (("--recipe", "mxrot-light", *OF_NETWORK, *FEW), at_fourth_step),
}
"""By scope, a recipe, and what kills the second process once something is kept."""

if __name__ == "__main__":
    main(Path(sys.argv[1]))
