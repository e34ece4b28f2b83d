"""Progress on no terminal: few lines, each with what a reader needs; and the bar's bookkeeping on one."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress
from tests.clock import Clock

from mxrot.progress import display as progress
from mxrot.progress import part_of
from mxrot.progress.pace import Pace
from mxrot.report import progress_on_stderr


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes only when a test says so."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # rich takes these for a terminal
        monkeypatch.delenv(name, raising=False)
    return clock


def test_first_line_comes_at_once_and_the_next_after_a_while(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on_stderr("Work") as told:
        assert capsys.readouterr().err == ""
        told(0, 100, "first")
        assert capsys.readouterr().err == "Work: 0 of 100 (first)\n"
        for done in range(1, 50):
            clock.now += 0.1
            told(done, 100, "more")
        assert capsys.readouterr().err == ""
        clock.now += 0.2
        told(50, 100, "more")
    shown = capsys.readouterr()
    assert shown.err == "Work: 50 of 100 (more), 5 s to go\n"
    assert shown.out == ""


def test_time_to_go_is_that_of_the_phase(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on_stderr("Work") as told:
        told(0, 10, "slow")
        clock.now += 100
        told(10, 10, "slow")
        told(0, 1000, "quick")
        capsys.readouterr()
        clock.now += 6
        told(600, 1000, "quick")
        assert capsys.readouterr().err == "Work: 600 of 1000 (quick), 4 s to go\n"
        clock.now += 6
        told(200, 1000, "again")  # the same total, but the count went back
        assert capsys.readouterr().err == "Work: 200 of 1000 (again)\n"
        clock.now += 10
        told(400, 1000, "again")
        assert capsys.readouterr().err == "Work: 400 of 1000 (again), 30 s to go\n"


def test_what_may_be_empty(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on_stderr("Work") as told:
        told(0, 3, "")
    assert capsys.readouterr().err == "Work: 0 of 3\n"


def test_an_error_goes_through(clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt), progress_on_stderr("Work") as told:
        told(0, 3, "")
        raise KeyboardInterrupt


def test_bar_starts_anew_with_each_phase() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with Progress(console=console, auto_refresh=False) as bar:
        told = progress._bar_mover(bar, "Work", Pace(0.0))
        assert bar.tasks[0].total is None
        told(5, 10, "first")
        told(10, 10, "first")
        assert (bar.tasks[0].completed, bar.tasks[0].total, bar.tasks[0].finished) == (10, 10, True)
        told(0, 10, "second")
        assert (bar.tasks[0].completed, bar.tasks[0].total, bar.tasks[0].finished) == (0, 10, False)
        assert bar.tasks[0].description == "Work: second"
        told(0, 30, "")
        assert (bar.tasks[0].total, bar.tasks[0].description) == (30, "Work")


def under_cells(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a stand-in for IPython shows: "new" and a line, then what takes the place of that line."""
    cell: list[str] = []

    def update(data: dict[str, str], raw: bool) -> None:
        assert raw and list(data) == ["text/plain"]
        cell.append(data["text/plain"])

    def display(data: dict[str, str], raw: bool, display_id: bool) -> SimpleNamespace:
        assert display_id
        cell.append("new")
        update(data, raw)
        return SimpleNamespace(update=update)

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    return cell


def test_who_is_shown_what(clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A function is told; True shows; False and a script are silent; a notebook has one line that changes."""
    told = []
    with progress.shown_progress(lambda *news: told.append(news), "Work") as function:
        function(0, 3, "a")
    assert told == [(0, 3, "a")]
    for option in (None, False):
        with progress.shown_progress(option, "Work") as function:
            function(0, 3, "a")
        assert capsys.readouterr().err == ""
    with progress.shown_progress(True, "Work") as function:
        function(0, 3, "a")
    assert capsys.readouterr().err == "Work: 0 of 3 (a)\n"
    monkeypatch.setattr(progress, "_is_notebook", lambda: True)
    cell = under_cells(monkeypatch)
    with progress.shown_progress(None, "Work") as function:
        function(0, 3, "long")
        clock.now += 1
        function(1, 3, "a")
    empty, third = "░" * 20, "█" * 6 + "░" * 14
    begun = ["new", f"Work: {empty} 0 of 3 (long)", f"Work: {third} 1 of 3 (a), 2 s to go"]
    assert cell == [*begun, f"Work: {'█' * 20} 3 of 3, 1 s"]  # a full bar at the end
    with pytest.raises(ValueError), progress.shown_progress(None, "Work") as function:
        function(0, 3, "a")
        raise ValueError
    assert cell[4:] == ["new", f"Work: {empty} 0 of 3 (a)"]  # and none after an error
    assert capsys.readouterr().err == ""


def test_what_will_be_done_is_said_once_there_is_something_to_tell(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_on_stderr("Work", "everything, on cpu") as told:
        told(0, 1, "opening")
        assert capsys.readouterr().err == ""
        told(0, 3, "parts")
        assert capsys.readouterr().err == "Work: everything, on cpu\nWork: 0 of 3 (parts)\n"


def test_a_heartbeat_is_a_line_a_minute_with_the_rate_and_the_time_to_go(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_on_stderr("Work", between=progress.HEARTBEAT_SECONDS) as told:
        for block in range(6):
            of_block = part_of(told, block, 1, 80, "blocks")
            of_block(0, 2, f"layers.{block}")
            clock.now += 20
            of_block(1, 2, f"layers.{block}.mlp")
            clock.now += 20
    assert capsys.readouterr().err.splitlines() == [
        "Work: 0 of 80 (layers.0)",
        "Work: 1 of 80 (layers.1.mlp), 90 blocks an hour, 52 min to go",
        "Work: 3 of 80 (layers.3), 90 blocks an hour, 51 min to go",
        "Work: 4 of 80 (layers.4.mlp), 90 blocks an hour, 50 min to go",
    ]


@pytest.mark.parametrize(("seconds", "said"), [(300, "12"), (7, "514"), (3600 * 3, "0.333")])
def test_a_rate_has_three_digits(clock: Clock, capsys: pytest.CaptureFixture[str], seconds: int, said: str) -> None:
    with progress_on_stderr("Work") as told:
        for done in (0, 1):
            part_of(told, done, 1, 1000, "blocks")(0, 1, "a")
            clock.now += seconds * (1 - done)
    assert f"Work: 1 of 1000 (a), {said} blocks an hour, " in capsys.readouterr().err
