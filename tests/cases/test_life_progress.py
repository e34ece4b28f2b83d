"""What work says while it goes on: in blocks that take minutes, in text that is written, while a model is opened."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.tiny_model import write_tiny_model

TOLD = list[tuple[float, int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("life") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"the number {number} follows {number - 1}; " for number in range(400)))
    return str(path)


def told_by(model: Path, text: str, recipe: Any, **options: Any) -> TOLD:
    """What quantizing tells."""
    import mxrot

    told: TOLD = []
    mxrot.quantize(model, recipe, calib=text, samples=4, seq_len=64, progress=lambda *n: told.append(n), **options)
    return told


@pytest.mark.case("F9")
@pytest.mark.parametrize("name", ["rtn", "duquant++", "mxrot"])
def test_the_first_block_tells_how_far_it_is(model: Path, text: str, name: str) -> None:
    """And so there is a time to go before it ends; the count never goes back."""
    blocks = [done for done, total, what in told_by(model, text, name) if total == 2 and "order" not in what]
    within = {done for done in blocks if 0 < done < 1}
    assert len(within) >= 4 and max(within) > 0.6
    assert blocks == sorted(blocks) and blocks[-1] == 2


@pytest.mark.case("F9")
def test_a_block_that_is_tuned_tells_of_its_steps(model: Path, text: str) -> None:
    from mxrot.recipe import load_recipe

    changes = {"tuning.scope": "block", "tuning.steps": 8, "tuning.checks": 2, "calibration.generated": 0}
    told = told_by(model, text, load_recipe("mxrot").changed(changes))
    steps = [done for done, _, what in told if what.startswith("model.layers.0, held-out loss")]
    assert len(steps) >= 4 and steps == sorted(steps) and 0 < steps[0] < steps[-1] <= 1


@pytest.mark.case("F9")
def test_the_bar_has_a_time_to_go_for_a_block_of_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich's own forgets what came more than half a minute ago, and shows -:--:-- from then on."""
    from rich.progress import Progress

    from mxrot.progress import display as progress

    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = io.StringIO()
    made: list[Progress] = []

    class Bar(Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options, auto_refresh=False, get_time=lambda: now[0])
            made.append(self)

    monkeypatch.setattr(progress.rich.progress, "Progress", Bar)
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=shown, force_terminal=True, width=120))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.progress_on_stderr("Quantizing") as told:
        told(0, 10, "first")
        now[0] += 120
        told(0.5, 10, "second")
        now[0] += 60
        shown.truncate(0)
        made[0].refresh()
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "-:--:--" not in text and "37 min to go" in text, text  # 9.5 blocks of 240 s, and 60 s have passed


@pytest.mark.case("F10")
def test_text_that_the_model_writes_is_counted(model: Path, text: str) -> None:
    told = [(done, total) for done, total, what in told_by(model, text, "mxrot") if "tokens that the model" in what]
    assert {total for _, total in told} == {4 * 64}
    assert len(told) >= 4 and told[0][0] == 0 and told[-1] == (256, 256)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.case("F12")
def test_what_says_nothing_still_shows_that_it_goes_on(tmp_path: Path) -> None:
    """On no terminal, where a model is opened for minutes: a line now and then, with what is done and since when."""
    program = """
import time
from mxrot.progress import display as progress
progress.SECONDS_BETWEEN_LINES = 0.2
with progress.progress_on_stderr("Evaluating") as told:
    told(0, 1, "opening a model")
    time.sleep(1.5)
    told(0, 1000, "tokens")
    time.sleep(0.5)
"""
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    lines = [line for line in found.stderr.splitlines() if line.startswith("Evaluating: ")]
    assert len(lines) >= 4, found.stderr
    assert all(re.fullmatch(r"Evaluating: opening a model, \d+ s so far", line) for line in lines[:3]), lines
    assert lines[-1].startswith("Evaluating: 0 of 1000 (tokens)"), lines


@pytest.mark.case("F12")
@pytest.mark.parametrize("command", ["eval", "inspect", "compare"])
def test_the_first_line_says_what_will_be_done(model: Path, text: str, command: str) -> None:
    from tests.cases.commands import mxrot

    more = ["--recipes", "rtn"] if command == "compare" else []
    result = mxrot(command, model, "--text", text, "--windows", "2", "--seq-len", "32", *more)
    assert result.exit_code == 0, result.output
    first, second = result.stderr.splitlines()[:2]
    assert str(model) in first and " on c" in first
    assert re.search(r": \d+ of \d+ \(", second)


@pytest.mark.case("F12")
@pytest.mark.parametrize(
    "variables", [{"TERM": "dumb"}, {"FORCE_COLOR": "1"}, {"NO_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}]
)
def test_a_log_has_lines_whatever_the_terminal_claims(variables: dict[str, str]) -> None:
    program = "from mxrot.report import progress_on_stderr as p\nwith p('Work') as told: told(0, 9, 'parts')"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | variables, check=True
    )
    own = [line for line in found.stderr.splitlines() if "Work" in line]
    assert own == ["Work: 0 of 9 (parts)"], found.stderr
