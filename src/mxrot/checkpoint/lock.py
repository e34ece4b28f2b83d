"""Only one living process at a time writes to an output.

The lock is flock(2) on a small file beside the output (see `Place.lock`), whose text names the holder. The system
releases the lock when its process ends for any reason, and the next run takes over the file. If a file system has no
such locks, the file itself is the lock: only one process can create it, and it counts as long as that process lives.
This can be checked on the same host only.
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
    """The start time of the process by the system's own count, if it is available. Process numbers are reused."""

    @classmethod
    def here(cls) -> Holder:
        return cls(os.getpid(), platform.node(), time.strftime("%Y-%m-%d %H:%M:%S"), _started(os.getpid()))

    @property
    def lives(self) -> bool:
        """True if the process may still be running. A process on another host counts as running."""
        if self.host != platform.node() or sys.platform == "win32":
            return True
        with suppress(PermissionError):  # the process of another user, which is running
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
            path.unlink()  # before the lock is released: a waiting process finds this file gone, and makes a new one
        os.close(file)


def check_free(path: Path, output: Path) -> None:
    """CheckpointError if another process holds the lock now."""
    if path.exists():
        with held(path, output):
            pass


def _take(path: Path, output: Path) -> int:
    """An open, locked file at `path`."""
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
                path.unlink(missing_ok=True)  # left by a process that has ended
            elif _stands_at(file, path):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(asdict(Holder.here())).encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _open(path: Path) -> tuple[int, bool]:
    """The open file, and True if this call created it. A link is never followed, because it may point anywhere."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        with suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with suppress(FileNotFoundError):
            return os.open(path, flags), False


def _lock(file: int) -> bool | None:
    """True if the file could be locked. None if there are no locks."""
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
    """True if the open file is still the one at `path`. Its holder may have removed it between opening and locking."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read(file: int) -> Holder | None:
    """The holder that the file names. None for an empty file or other contents."""
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
    """The start time of a process, as Linux counts it. Empty if it is not available."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
