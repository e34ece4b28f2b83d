"""Where an output may be, where it is made, and which run may write to it.

Most outputs are made in `NAME.partial` beside the output, and appear with one rename (placing.py). Some outputs cannot
be renamed: a mount point, as with `docker -v $PWD/out:/out`, or a folder whose parent accepts no new names. These are
made in a folder inside the output, and filled from there.

All steps use the real path. Two spellings of one folder are therefore one output, and a link to a folder stays a link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mxrot.checkpoint.lock import check_free, held
from mxrot.errors import CheckpointError, DiskFullError

_INSIDE, _INSIDE_LOCK = "mxrot.partial", ".mxrot.lock"
_OF_THE_SYSTEM = {"lost+found"}
"""A folder at the top of a file system. It is never read and never moved."""


@dataclass(frozen=True)
class Place:
    """An output folder, and the paths beside it while it is made."""

    shown: Path
    """The path as the user gave it."""
    output: Path
    """The real path of the output."""
    is_filled: bool
    """True if the output is made inside the folder and filled in place, instead of being renamed there."""

    @property
    def partial(self) -> Path:
        """The folder in which the work is done."""
        return self.output / _INSIDE if self.is_filled else self._beside("{}.partial")

    @property
    def lock(self) -> Path:
        return self.output / _INSIDE_LOCK if self.is_filled else self._beside(".{}.mxrot.lock")

    def contents(self) -> list[Path]:
        """Everything at the output that belongs to the user."""
        if not self.output.is_dir():
            return []
        own = {_INSIDE, _INSIDE_LOCK} if self.is_filled else set()
        return sorted(path for path in self.output.iterdir() if path.name not in own | _OF_THE_SYSTEM)

    def free_backup(self) -> Path:
        """An unused name beside the output."""
        names = (self._beside("{}.replaced" + (f"-{number}" if number else "")) for number in range(1 << 16))
        return next(path for path in names if not os.path.lexists(path))

    def _beside(self, pattern: str) -> Path:
        return self.output.with_name(pattern.format(self.output.name))


def find_place(output: Path) -> Place:
    """The place where `output` is made. CheckpointError if it has no name or is not a folder."""
    if output.name in ("", ".."):
        raise CheckpointError(f"{output}: has no name of its own; name the folder to be made")
    try:
        real = output.resolve()
        for path in (output, *output.parents, real):
            if os.path.lexists(path) and not path.is_dir() and not _dangles(path):
                raise CheckpointError(f"{path}: is a file; give a folder")
        place = Place(output, real, real.is_dir() and _must_be_filled(real))
        for path in (place.partial, place.lock):
            with suppress(FileNotFoundError):
                path.lstat()  # the name may be too long
        str(real).encode()
        return place
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{output}: is not UTF-8, in which safetensors takes names; give another one") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        reason = getattr(error, "strerror", None) or "its links lead nowhere"
        raise CheckpointError(f"{output}: cannot be an output folder ({reason}); give another one") from error


def _dangles(path: Path) -> bool:
    """True if the path is a link whose target does not exist."""
    return path.is_symlink() and not path.exists()


def check_output(output: Path, force: bool) -> None:
    """CheckpointError if `output` exists and is not an empty folder, unless `force` replaces it, or if another run is
    writing there now."""
    place = find_place(output)
    check_free(place.lock, output)
    check_empty(place, force)


def check_empty(place: Place, force: bool) -> None:
    """CheckpointError if the output is not empty, unless `force` replaces it."""
    if place.contents() and not force:
        raise CheckpointError(f"{place.shown}: exists and is not empty; use --force to replace it, or another folder")


@contextmanager
def claimed(output: Path) -> Iterator[Place]:
    """While open, no other run writes to `output`. Missing parent folders are created, and removed again if they stay
    empty.

    CheckpointError if another run holds the output, or if files cannot be created there.
    """
    place = find_place(output)
    parent = place.lock.parent
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(place.lock, output))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(f"{output}: no space left on the device") from error
            raise CheckpointError(
                f"{output}: cannot be made, {parent} takes no files ({error.strerror}); give another folder"
            ) from error
        yield place


def _remove_empty(folders: list[Path]) -> None:
    for path in folders:
        with suppress(OSError):  # not empty: it holds the output
            path.rmdir()


def _must_be_filled(real: Path) -> bool:
    if (real / _INSIDE).is_dir() or (real / _INSIDE_LOCK).exists() or real in _mount_points() or os.path.ismount(real):
        return True
    if os.path.lexists(real.with_name(real.name + ".partial")):
        return False
    with suppress(OSError):
        if Path.cwd().is_relative_to(real):  # the current folder of a shell, which would be gone
            return True
    return os.access(real, os.W_OK | os.X_OK) and not _can_be_renamed(real)


def _can_be_renamed(real: Path) -> bool:
    if not os.access(real.parent, os.W_OK | os.X_OK):
        return False
    above = real.parent.stat()
    mine = os.geteuid() if hasattr(os, "geteuid") else 0
    # In folders such as /tmp, users can rename only their own entries.
    return not above.st_mode & stat.S_ISVTX or mine in (0, above.st_uid, real.stat().st_uid)


def _mount_points() -> set[Path]:
    """All mount points, with bind mounts of the same file system, which `os.path.ismount` does not detect."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    fields = (line.split()[4] for line in lines if len(line.split()) > 4)
    return {Path(os.fsdecode(_unescaped(field))) for field in fields}


def _unescaped(field: bytes) -> bytes:
    r"""Decode spaces, tabs, newlines and backslashes, which are written as \040, \011, \012 and \134."""
    for code in (0o40, 0o11, 0o12, 0o134):
        field = field.replace(b"\\%03o" % code, bytes([code]))
    return field
