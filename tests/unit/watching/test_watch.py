"""A limit of time, what is handed on, and files that keep it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.clock import Clock

from mxrot.errors import ConfigError, TimeLimitError
from mxrot.watching import Board, JsonLines, TimeLimit, Watch, check_board, seconds_of
from mxrot.watching import limit as limits
from mxrot.watching import watch as watching


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes only when a test says so."""
    clock = Clock()
    for module in (limits, watching):
        monkeypatch.setattr(module, "time", clock)
    return clock


class Ear:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def hear(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 5400), ("8h", 28800), ("1h30m", 5400), ("45s", 45), ("1.5h", 5400), ("1d2h", 93600), (" 2H ", 7200)],
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text, "--time-limit") == seconds


@pytest.mark.parametrize("text", ["", "8", "h", "0h", "30m1h", "1h 30m", "-1h", "soon", "1:30:00"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a duration; write it as in 90m, 8h, 1h30m or 1d"):
        seconds_of(text, "--time-limit")


def test_it_ends_before_the_next_block_would_by_the_longest_so_far(clock: Clock) -> None:
    watch = Watch(TimeLimit(1000, clock.now))
    for seconds in (100, 300, 100):
        clock.now += seconds
        watch.finish("block", seconds)
        watch.end_if_over("block", "a block")  # 500 are left at last
    clock.now += 250
    watch.finish("block", 200)  # what lies between two of them counts, too
    with pytest.raises(TimeLimitError) as ended:
        watch.end_if_over("block", "block 4 of 9")
    assert str(ended.value) == (
        "stopped after block 4 of 9, by the time limit of 17 min, of which 4 min are left; the next block would take "
        "about 5 min"
    )
    assert ended.value.exit_code == 75


def test_blocks_of_an_earlier_run_tell_how_long_one_takes(clock: Clock) -> None:
    watch = Watch(TimeLimit(1000, clock.now))
    watch.skip("block", 800)
    clock.now += 100
    watch.finish("block", 100)
    clock.now += 101
    assert watch.is_over("block") and not watch.is_over("look")


def test_without_a_limit_it_never_ends(clock: Clock) -> None:
    clock.now += 1e9
    assert not Watch().is_over("block")
    assert not Watch(TimeLimit(1, 0.0)).without_limit().is_over("block")


def test_processes_end_together_and_the_first_one_keeps_events(clock: Clock) -> None:
    """One of them is late."""
    ear = Ear()
    late = SimpleNamespace(rank=1, largest=lambda count: max(count, 1))
    watch = Watch(TimeLimit(1000, clock.now), [ear])
    other = watch.among(late)
    other.finish("block", 1.0)
    assert not ear.events and other.is_over("block")
    watch.among(SimpleNamespace(rank=0, largest=int)).finish("block", 1.0)
    assert len(ear.events) == 1 and not watch.is_over("block")


def test_an_event_has_its_time_and_how_long_it_took(clock: Clock) -> None:
    ear = Ear()
    watch = Watch(None, [ear])
    watch.skip("look")
    clock.now += 12.5
    watch.finish("look", step=3, held_out=0.5)
    (event,) = ear.events
    assert event.pop("time").endswith("Z")
    assert event == {"event": "look", "elapsed": 12.5, "seconds": 12.5, "step": 3, "held_out": 0.5}


def test_lines_are_there_at_once_and_a_torn_one_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    first = JsonLines(path, goes_on=False)
    assert not path.exists()  # a run that is refused leaves what was there
    first.hear({"a": 1, "b": {"c": [math.nan, 2.0]}})
    assert path.read_text() == '{"a": 1, "b": {"c": [null, 2.0]}}\n'
    first.close()
    path.write_bytes(path.read_bytes() + b'{"torn')
    again = JsonLines(path, goes_on=True)
    again.hear({"a": 2})
    again.close()
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 2]
    new = JsonLines(path, goes_on=False)
    new.hear({"a": 3})
    new.close()
    assert json.loads(path.read_text()) == {"a": 3}


BLOCK = {
    "event": "block", "time": "", "elapsed": 3.0, "seconds": 2.0, "block": 4, "blocks": 9, "name": "layers.4",
    "tokens": None, "errors": {"qkv": {"weight": 0.1, "output": None}}, "memory": {"host_peak_bytes": 5},
}  # fmt: skip
LOOK = {
    "event": "look",
    "time": "",
    "elapsed": 3.0,
    "seconds": 2.0,
    "name": "light",
    "step": 7,
    "train": None,
    "held_out": 0.5,
}


def test_the_board_gets_the_numbers_over_blocks_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            drawn.append((tag, value, step))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    board = Board(tmp_path)
    for event in (BLOCK, LOOK):
        board.hear(event)
    board.close()
    assert drawn == [
        ("block/elapsed", 3.0, 4),
        ("block/seconds", 2.0, 4),
        ("block/errors/qkv/weight", 0.1, 4),
        ("block/memory/host_peak_bytes", 5.0, 4),
        ("look/light/elapsed", 3.0, 7),
        ("look/light/seconds", 2.0, 7),
        ("look/light/held_out", 0.5, 7),
    ]


@pytest.mark.filterwarnings("ignore")  # of its dependencies
def test_the_board_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path)
    board.hear(BLOCK)
    found = EventAccumulator(str(tmp_path)).Reload()  # before it is closed: a run may be killed
    assert [(point.step, point.value) for point in found.Scalars("block/seconds")] == [(4, 2.0)]
    board.close()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxrot.watching import board

    monkeypatch.setattr(board, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--tensorboard b: needs the package tensorboard; pip install 'mxrot"):
        check_board(Path("b"), "--tensorboard")
