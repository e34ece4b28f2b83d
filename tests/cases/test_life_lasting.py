"""Runs that last: a limit of time, and files that tell of each block and each look of tuning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cases.commands import mxrot, refused
from tests.tiny_model import write_tiny_model

from mxrot.watching import TimeLimit

BLOCK_KEYS = {"event", "time", "elapsed", "seconds", "block", "blocks", "name", "tokens", "errors", "memory"}
LOOK_KEYS = {"event", "time", "elapsed", "seconds", "name", "step", "train", "held_out"}
TUNED = ("-r", "mxrot-tuned", "--set", "tuning.steps=4", "--set", "tuning.checks=4", "--set", "tuning.generated=0")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """To quantize a model of three blocks; the output follows."""
    folder = tmp_path_factory.mktemp("lasting")
    model = write_tiny_model(folder / "tiny", num_hidden_layers=3)
    (folder / "words.txt").write_text("".join(f"the number {number} follows {number - 1}; " for number in range(400)))
    text = ("--calib", str(folder / "words.txt"), "--samples", "4", "--seq-len", "64")
    return ("quantize", str(model), *text, "--set", "calibration.generated=0", "-o")


def is_short(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the time be over at the n-th question of a run."""
    asked: list[int] = []

    def left(self: TimeLimit) -> float:
        asked.append(1)
        return -1.0 if len(asked) >= after else 1e9

    monkeypatch.setattr(TimeLimit, "left", left)


def stopped(*command: str | Path) -> str:
    """The one line of a command that a time limit has ended."""
    result = mxrot(*command)
    assert result.exit_code == 75 and isinstance(result.exception, SystemExit), result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("mxrot: ")]
    return line


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but run.json, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.case("F20")
@pytest.mark.parametrize("recipe", ["rtn", "duquant++-gptq"])
def test_a_time_limit_stops_after_a_block(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Once more, too; at last come the bytes of an unbroken run, and a line for each block."""
    words, lines, out = ("quantize", *words[1:]), tmp_path / "lines.jsonl", tmp_path / "out"
    more = ("-r", recipe, "--metrics", str(lines))
    for number in (1, 2):
        with monkeypatch.context() as patched:
            is_short(patched, after=1)
            line = stopped(*words, out, *more, "--time-limit", "1h30m", *["--resume"] * (number > 1))
        assert line.startswith(
            f"mxrot: stopped after block {number} of 3, by the time limit of 90 min, of which 0.0 s are"
        )
        assert line.endswith(f"kept in {out}.partial; the same command with --resume continues from there")
        assert len(list((tmp_path / "out.partial").glob("block-*"))) == number and not out.exists()
    with monkeypatch.context() as patched:
        is_short(patched, after=1)  # after the last block there is nothing to stop for
        assert mxrot(*words, out, *more, "--time-limit", "1h30m", "--resume").exit_code == 0
    assert mxrot(*words, tmp_path / "straight", "-r", recipe).exit_code == 0
    assert contents(out) == contents(tmp_path / "straight")
    assert [(event["event"], event["block"]) for event in events(lines)] == [("block", index) for index in range(3)]


@pytest.mark.case("F20")
def test_a_time_limit_stops_tuning_after_a_look(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, out = tmp_path / "lines.jsonl", tmp_path / "out"
    more = (*TUNED, "--metrics", str(lines))
    with monkeypatch.context() as patched:
        is_short(patched, after=2)
        line = stopped(*words, out, *more, "--time-limit", "8h")
    assert line.startswith("mxrot: stopped after step 2 of 4 of distillation, by the time limit of 8 h 0 min")
    assert "an unfinished tuning is kept" in line
    assert mxrot(*words, out, *more, "--time-limit", "8h", "--resume").exit_code == 0
    assert mxrot(*words, tmp_path / "straight", *TUNED).exit_code == 0
    assert contents(out) == contents(tmp_path / "straight")
    looks = [event for event in events(lines) if event["event"] == "look"]
    assert [look["step"] for look in looks] == [0, 1, 2, 3, 4] and all(look.keys() == LOOK_KEYS for look in looks)
    checks = json.loads((out / "run.json").read_text())["tuning"]
    assert [(look["train"], look["held_out"]) for look in looks] == [(x["train"], x["held_out"]) for x in checks]


@pytest.mark.case("F20")
def test_a_line_tells_of_a_block_what_run_json_does(words: tuple[str, ...], tmp_path: Path) -> None:
    lines, out = tmp_path / "lines.jsonl", tmp_path / "out"
    tuning = ("--set", "tuning.scope=block", "--set", "tuning.steps=2", "--set", "tuning.checks=1")
    assert mxrot(*words, out, *TUNED, *tuning, "--metrics", lines, "--time-limit", "8h").exit_code == 0
    found, run = events(lines), json.loads((out / "run.json").read_text())
    assert [event["event"] for event in found] == ["look", "look", "block"] * 3
    for event, block in zip(found[2::3], run["blocks"], strict=True):
        assert event.keys() == BLOCK_KEYS and event["blocks"] == 3 and event["name"] == f"model.layers.{block['index']}"
        assert event["tokens"] == 4 * 64 and event["seconds"] == block["seconds"]
        assert event["memory"]["gpu_peak_bytes"] is None and event["memory"]["host_peak_bytes"] > 1e7
        down = [linear for linear in block["linears"] if linear["name"].endswith("down_proj")]
        errors = event["errors"][down[0]["site"]]
        assert (errors["weight"], errors["output"]) == (down[0]["weight_error"], down[0]["output_error"])
    assert [look["name"] for look in found[::3]] == [f"model.layers.{index}" for index in range(3)]


@pytest.mark.case("F20")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--time-limit", "90"), "--time-limit 90: is not a duration"),
        (("--metrics", "nowhere/lines.jsonl"), "--metrics nowhere/lines.jsonl: the folder "),
        (("--tensorboard", "out/board"), "is in the output folder, which is made at the end"),
    ],
)
def test_what_cannot_be_is_refused_first(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(*words, "out", "-r", "rtn", *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.case("F20")
def test_nothing_of_tensorboard_is_imported_without_it(words: tuple[str, ...], tmp_path: Path) -> None:
    program = (
        "import sys; from tests.cases.commands import mxrot; assert mxrot(*sys.argv[1:]).exit_code == 0; "
        "print([name for name in sys.modules if 'tensorboard' in name])"
    )
    command = [sys.executable, "-c", program, *words, str(tmp_path / "out"), "-r", "rtn"]
    command += ["--metrics", str(tmp_path / "lines.jsonl")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.case("F20")
def test_in_python_a_limit_needs_an_output(words: tuple[str, ...]) -> None:
    import mxrot as package
    from mxrot.errors import ConfigError
    from mxrot.watching import Watch

    with pytest.raises(ConfigError, match="it needs an output"):
        package.quantize(words[1], "rtn", watch=Watch(TimeLimit(60)))
