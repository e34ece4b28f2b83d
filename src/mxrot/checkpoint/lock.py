"""One living process at a time writes to an output.

The lock is flock(2) on a small file beside the output (see `Place.lock`), which says for people whose it is. The
system lets go of it when its process ends, however it ends, and the next run takes the file that was left. Where a
file system has no such locks, the file itself is the lock: it is made by one process only, and counts as long as that
process lives, which can be told on the same host only.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mxrot.errors import CheckpointError

if sys.platform != "win32":
    import fcntl

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_MOST_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """The process that a lock file names."""

    pid: int
    host: str
    since: str
    started: str
    """Of the process, in the system's own count, where it tells: numbers of processes are used again."""

    @classmethod
    def here(cls) -> Holder:
        return cls(os.getpid(), platform.node(), time.strftime("%Y-%m-%d %H:%M:%S"), _started(os.getpid()))

    @property
    def lives(self) -> bool:
        """Whether it may still be at work; a process of another host may."""
        if self.host != platform.node() or sys.platform == "win32":
            return True
        with suppress(PermissionError):  # somebody else's, and there
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False
        return self.started == _started(self.pid)


@contextmanager
def held(path: Path, output: Path) -> Iterator[None]:
    """Hold the lock file `path` of `output`, and remove it at the end.

    CheckpointError if another process, or another call in this one, holds it.
    """
    file = _take(path, output)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before it is let go of: who waits for this very file finds it gone, and makes another
        os.close(file)


def check_free(path: Path, output: Path) -> None:
    """CheckpointError if somebody holds it now."""
    if path.exists():
        with held(path, output):
            pass


def _take(path: Path, output: Path) -> int:
    """An open, locked file that stands at `path`."""
    while True:
        file, is_new = _open(path)
        try:
            found = _read(file)
            if found is None and os.fstat(file).st_size:
                raise CheckpointError(f"{path}: is not a lock of mxrot, and its name is needed for one; move it away")
            locks = _lock(file)
            if locks is False or (locks is None and not is_new and (found is None or found.lives)):
                raise CheckpointError(_busy(output, path, found, locks is None))
            if locks is None and not is_new:
                path.unlink(missing_ok=True)  # of a process that is gone
            elif _stands_at(file, path):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(asdict(Holder.here())).encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _open(path: Path) -> tuple[int, bool]:
    """The file, and whether this call has made it. Never through a link, which may point anywhere."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        with suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with suppress(FileNotFoundError):
            return os.open(path, flags), False


def _lock(file: int) -> bool | None:
    """Whether it could be had; None where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            return None
        raise
    return True


def _stands_at(file: int, path: Path) -> bool:
    """Is it still the file of that name? Its holder may have removed it between opening and locking."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read(file: int) -> Holder | None:
    """Whom it names; None for an empty file, or another one."""
    try:
        table: Any = json.loads(os.pread(file, _MOST_BYTES, 0))
        return Holder(int(table["pid"]), str(table["host"]), str(table["since"]), str(table["started"]))
    except (ValueError, KeyError, TypeError):
        return None


def _busy(output: Path, path: Path, holder: Holder | None, is_without_locks: bool) -> str:
    who = "another run" if holder is None else f"process {holder.pid} on {holder.host}, since {holder.since},"
    remedy = f", or remove {path} if there is no such process" if is_without_locks else ""
    return f"{output}: {who} is writing there; wait for it, or give another folder{remedy}"


def _started(pid: int) -> str:
    """When a process has started, as Linux counts; empty where that is not told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
