"""`mxrot eval`, `report` and `compare` in several processes and in one.

`python -m tests.unit.ranked_evaluation FOLDER`.

A process of its own, as tests.unit.ranked is. What each command left and said goes to outcomes.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from tests.tiny_model import write_tiny_model
from tests.unit.evaluation.task_folder import write_scorable_model, write_task_folder
from tests.unit.ranked import LENGTH, Fault, commands, touch_nothing

from mxrot import api
from mxrot.evaluation import Answers


def main(folder: Path) -> None:
    """A checkpoint beside the original, in batches of two windows; tasks; and a comparison."""
    found: dict[str, object] = {}
    api.EVALUATION_TOKENS = {"cpu": 2 * LENGTH}
    keep_answers()
    write_tiny_model(folder / "tiny")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    words = ["quantize", str(folder / "tiny"), "-o", str(folder / "one-tiny"), "--recipe", "rtn"]
    commands(folder, words, 1, {})
    write_scorable_model(folder / "scorable")
    write_task_folder(folder / "tasks")
    apart = [str(folder / "one-tiny"), "--against", str(folder / "tiny"), "--text", str(folder / "text.txt")]
    asked = [str(folder / "scorable"), "--tasks", "piqa,lambada_openai", "--task-data", str(folder / "tasks")]
    shape = ["--windows", "5", "--seq-len", str(LENGTH)]
    quiet: dict[int, Fault] = {1: touch_nothing, 2: touch_nothing}
    for size in (1, 2, 3):
        runs = {"apart": [*apart, *shape], "asked": asked}
        for name, words in runs.items():
            if size < 3 or name == "apart":
                json_file = str(folder / f"{name}-{size}.json")
                ended = commands(folder, ["eval", *words, "--json", json_file], size, quiet)
                found[f"{name} {size}"] = [asdict(one) for one in ended]
    for size in (1, 2):
        words = ["report", *apart, *shape, "-o", str(folder / f"report-{size}.html")]
        found[f"reported {size}"] = [asdict(one) for one in commands(folder, words, size, quiet)]
    recipes = "rtn,mxrot,duquant++,mr-gptq-128"  # blocks of 128 are too large for the last
    words = [
        "compare",
        str(folder / "scorable"),
        "--recipes",
        recipes,
        "--seeds",
        "2",
        "--samples",
        "4",
        "--windows",
        "3",
    ]
    words += ["--seq-len", str(LENGTH), "--calib", str(folder / "text.txt"), "--text", str(folder / "text.txt")]
    for size, work, more in ((1, "one", []), (2, "two", []), (2, "two", ["--resume"]), (3, "one", ["--resume"])):
        name = f"compared {size}{' again' if more else ''}"
        places = ["--json", str(folder / f"{name}.json"), "--csv", str(folder / f"{name}.csv")]
        places += ["--work", str(folder / f"work-{work}"), *more]
        found[name] = [asdict(one) for one in commands(folder, [*words, *places], size, quiet)]
    # What a run that was interrupted has kept: half of the answers.
    kept = (folder / "asked-1.json.kept").read_text().splitlines()
    (folder / "asked-2.json.partial").write_text("\n".join(kept[: len(kept) // 2]) + "\n")
    words = ["eval", *asked, "--json", str(folder / "asked-2.json"), "--resume"]
    found["asked again"] = [asdict(one) for one in commands(folder, words, 2, {})]
    (folder / "outcomes.json").write_text(json.dumps(found))


def keep_answers() -> None:
    """Keep a copy of the answers to tasks, which are removed at the end."""
    original = Answers.remove

    def remove(self: Answers) -> None:
        if self._path is not None and self._path.exists():
            shutil.copy(self._path, self._path.with_suffix(".kept"))
        original(self)

    Answers.remove = remove  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
