"""Put a finished folder in its place.

The last rename comes before the notes of a run go. A note, `placing.json`, says what the rename replaces, by the number
that the file system gives it; so whatever moment a run is killed at, the next one can tell a finished output from one
that is to be put in place, and what is left of a replaced one from a folder of somebody else.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mxrot.checkpoint.exchange import exchange
from mxrot.checkpoint.files import write_json
from mxrot.checkpoint.output import Place
from mxrot.documents import read_json
from mxrot.errors import DamagedError

PLACING = "placing.json"
REPLACED = "replaced"
"""In the partial folder of an output that is filled: what stood there before."""
_NOT_RENAMED = {errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES}


def put_in_place(place: Place, is_note: Callable[[str], bool]) -> None:
    """Put the finished partial folder in place. What stood there goes last, and then what `is_note` says of names.

    OSError leaves both the finished folder and what stood there.
    """
    partial, output = place.partial, place.output
    if place.is_filled:
        _fill(place, is_note)
        return
    old = output if output.is_dir() else None
    backup = place.free_backup()
    write_json(partial / PLACING, _note(replaces=_identity(old), backup=backup.name))
    try:
        if old is None or not any(old.iterdir()):
            partial.rename(output)
        elif not exchange(partial, output):
            _rename_twice(partial, output, backup)
    except OSError as error:
        if error.errno not in _NOT_RENAMED or not output.is_dir():
            raise
        # A mount that nothing told of, or a folder of a lower layer of a container.
        (partial / PLACING).unlink()
        _fill(place, is_note)
        return
    finish_placing(place, is_note)


def finish_placing(place: Place, is_note: Callable[[str], bool]) -> None:
    """Do what a killed run left to do after, or at, its last rename; nothing where there was none."""
    partial, output = place.partial, place.output
    if (note := _read(output / PLACING)) is not None:
        for path in (partial, output.with_name(str(note.get("backup")))):
            if _identity(path) == note.get("replaces") is not None:
                shutil.rmtree(path)
        remove_notes(output, is_note)
    elif (note := _read(partial / PLACING)) is not None:
        if note.get("fills") is True:
            _fill(place, is_note)
            return
        backup = output.with_name(str(note.get("backup")))
        if not output.exists() and _identity(backup) == note.get("replaces") is not None:
            backup.rename(output)


def remove_notes(folder: Path, is_note: Callable[[str], bool]) -> None:
    """Remove what only a resumed run needs; what says that the folder is in its place last."""
    for path in folder.iterdir():
        if is_note(path.name) and path.name != PLACING:
            path.unlink()
    (folder / PLACING).unlink(missing_ok=True)


def _rename_twice(partial: Path, output: Path, backup: Path) -> None:
    """Where folders cannot change places in one step."""
    output.rename(backup)
    try:
        partial.rename(output)
    except OSError:
        backup.rename(output)
        raise


def _fill(place: Place, is_note: Callable[[str], bool]) -> None:
    """Move the files of the partial folder into the output; what stood there waits in the partial folder."""
    partial, output = place.partial, place.output
    old = partial / REPLACED
    note = _read(partial / PLACING)
    if note is None:
        note = _note(fills=True, is_empty=False)
        write_json(partial / PLACING, note)
    if not note.get("is_empty"):
        old.mkdir(exist_ok=True)
        try:
            for path in place.contents():
                path.rename(old / path.name)
        except OSError:
            for path in old.iterdir():
                path.rename(output / path.name)
            (partial / PLACING).unlink()
            raise
        write_json(partial / PLACING, note | {"is_empty": True})
    new = [path for path in partial.iterdir() if path != old and not is_note(path.name)]
    for path in sorted(new, key=lambda path: path.name == "run.json"):  # last: with it the output is whole
        _move(path, output / path.name)
    if old.exists():
        shutil.rmtree(old)
    remove_notes(partial, is_note)
    partial.rmdir()


def _move(path: Path, target: Path) -> None:
    try:
        path.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
            shutil.rmtree(path)
            return
        unfinished = target.with_name(target.name + ".tmp")
        shutil.copyfile(path, unfinished)
        unfinished.replace(target)
        path.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        table = read_json(path)
    except DamagedError:
        return None
    return table if table.get("by") == "mxrot" else None


def _note(**what: Any) -> dict[str, Any]:
    return {"by": "mxrot"} | what


def _identity(path: Path | None) -> list[int] | None:
    """Number of a folder in its file system, which a rename does not change."""
    if path is None:
        return None
    with suppress(OSError):
        found = os.lstat(path)
        return [found.st_dev, found.st_ino]
    return None
