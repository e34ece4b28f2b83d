"""A lock holds as long as its process lives, and no longer."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mxrot.checkpoint import lock
from mxrot.checkpoint.lock import check_free, held
from mxrot.errors import CheckpointError

_HOLDER = """
import sys
from pathlib import Path
from mxrot.checkpoint.lock import held
with held(Path(sys.argv[1]), Path("out")):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen]:
    """One that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def take(path: Path) -> None:
    with held(path, Path("out")):
        pass


def test_one_holder_at_a_time_in_this_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held(path, Path("out")):
        with pytest.raises(CheckpointError, match=rf"^out: process {os.getpid()} on .* is writing there; wait for it"):
            take(path)
        with pytest.raises(CheckpointError, match="is writing there"):
            check_free(path, Path("out"))
        assert path.exists()
    assert not path.exists()
    take(path)
    check_free(path, Path("out"))
    assert list(tmp_path.iterdir()) == []


def test_another_process_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with another_process(path) as process:
        with pytest.raises(CheckpointError, match=f"process {process.pid} on"):
            take(path)
        process.kill()
        process.wait()
        assert path.exists()  # nobody could remove it
        take(path)
    assert not path.exists()


def test_an_error_lets_go_of_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path / "lock", Path("out")):
        1 / 0  # noqa: B018
    take(tmp_path / "lock")


@pytest.mark.parametrize("text", ["thesis", "{}", '{"pid": 1}', "[]"])
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    with pytest.raises(CheckpointError, match="is not a lock of mxrot"):
        take(tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == text


def test_never_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match="symbolic link"):
        take(tmp_path / "lock")
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_an_empty_file_is_taken(tmp_path: Path) -> None:
    """As a process leaves it that was killed between making and writing it."""
    (tmp_path / "lock").touch()
    take(tmp_path / "lock")


def test_without_locks_the_file_is_the_lock(tmp_path: Path, no_locks: None) -> None:
    path = tmp_path / "lock"
    with held(path, Path("out")), pytest.raises(CheckpointError, match=r"or remove .*lock if there is no such process"):
        take(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "is_held"),
    [
        ({}, True),
        ({"started": "1"}, False),  # another process has the number now
        ({"pid": 2**22 + 1}, False),  # above the largest that there can be
        ({"host": "elsewhere", "pid": 2**22 + 1}, True),
    ],
)
def test_without_locks_a_process_that_is_gone_holds_nothing(
    tmp_path: Path, no_locks: None, changes: dict[str, object], is_held: bool
) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps(vars(lock.Holder.here()) | changes))
    if is_held:
        with pytest.raises(CheckpointError, match="is writing there"):
            take(path)
        assert path.exists()
    else:
        take(path)
        assert not path.exists()


def test_other_errors_of_the_system_are_not_taken_for_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        take(tmp_path / "lock")
