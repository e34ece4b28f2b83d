"""`mxrot search` in several processes and in one: `python -m tests.unit.ranked_search FOLDER`.

A process of its own, as tests.unit.ranked is. What each command left and said goes to outcomes.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.tiny_model import write_tiny_model
from tests.unit.ranked import LENGTH, Fault, commands, kill, touch_nothing

from mxrot.errors import NumericsError
from mxrot.search.bits import Mixture, spelled
from mxrot.search.meter import NOT_FINITE, Meter
from mxrot.search.roundings import OtherRoundings

FIRST = "down.1="
"""What the first raise of one block begins with, as it is spelled."""


def main(folder: Path) -> None:
    """From the beginning, with a lower budget from what is kept, after a kill, and with mixtures that break."""
    found: dict[str, object] = {}
    write_tiny_model(folder / "tiny")
    (folder / "text.txt").write_text("".join(f"the number {number} follows {number - 1}; " for number in range(200)))

    def outcome(
        name: str,
        size: int,
        work: str,
        faults: Sequence[Fault | None] = (),
        more: Sequence[str] = (),
        recipe: str = "mxrot",
    ) -> None:
        text = str(folder / "text.txt")
        words = ["search", str(folder / "tiny"), "--calib", text, "--text", text, "--samples", "5", "--windows", "3"]
        words += ["--seq-len", str(LENGTH), "--choices", "mxfp6_e2m3,mxfp8_e4m3", "--bits", "5.5", "-r", recipe]
        words += ["--work", str(folder / work), "-o", str(folder / f"{name}.toml")]
        words += ["--json", str(folder / f"{name}.json"), *more]
        by_rank = {rank: fault for rank, fault in enumerate(faults) if fault is not None}
        found[name] = [asdict(one) for one in commands(folder, words, size, by_rank)]

    for size in (1, 2, 3):
        outcome(f"whole {size}", size, f"work-{size}", [None, touch_nothing, touch_nothing][:size])
    lower = ["--resume", "--bits", "4.9"]
    for size in (1, 2):
        shutil.copytree(folder / "work-3", folder / f"lower-{size}")
        outcome(f"lower {size}", size, f"lower-{size}", more=lower)
    outcome("killed in the pass", 2, "killed", [None, partial(at_call, OtherRoundings, "__call__", 6, kill)])
    outcome("killed measuring", 2, "killed", [None, partial(at_call, Meter, "_measured", 6, kill)], ["--resume"])
    outcome("resumed", 1, "killed", more=["--resume"])
    extra = sorted(measured(folder / "work-2").keys() - measured(folder / "work-1").keys())
    found["extra"] = extra
    for name, size, what in (
        ("broken, not needed", 2, extra[-1:]),
        ("broken 1", 1, [f"seen: {FIRST}"]),
        ("broken 2", 2, [f"seen: {FIRST}"]),
    ):
        shutil.copytree(folder / "work-1", folder / name)
        forget_measurements(folder / name)
        outcome(name, size, name, [partial(break_at, *what)] * size, ["--resume"])
    outcome("refused", 2, "refused", recipe="spinquant")
    outcome("no bits", 3, "refused", more=["--bits", "4"])
    (folder / "outcomes.json").write_text(json.dumps(found))


def measured(work: Path) -> dict[str, list[float]]:
    """What a search has noted, by what it was; each once."""
    lines = [line for path in work.rglob("measured.jsonl") for line in path.read_text().splitlines() if line]
    tables = [json.loads(line) for line in lines]
    found = {table["what"]: table["kl"] for table in tables}
    assert len(found) == len(tables), "noted twice"
    return found


def forget_measurements(work: Path) -> None:
    """Leave only what was quantized and rounded."""
    for path in work.rglob("measured.jsonl"):
        path.unlink()


def at_call(owner: type, name: str, number: int, fault: Fault) -> None:
    """Let `fault` happen at that call of a method."""
    original, calls = getattr(owner, name), [0]

    def called(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            fault()
        return original(*arguments)

    setattr(owner, name, called)


def break_at(what: str) -> None:
    """Let mixtures whose names begin so give nothing finite."""
    original = Meter._measured

    def measured(meter: Meter, mixture: Mixture) -> list[float]:
        if f"{meter._name}: {spelled(mixture)}".startswith(what):
            raise NumericsError(NOT_FINITE)
        return original(meter, mixture)

    Meter._measured = measured  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
