"""Put a finished folder in its place.

The last rename happens before the notes of a run are removed. A note, `placing.json`, records which folder the rename
replaces, by its inode number. After a run is killed at any moment, the next run can therefore tell a finished output
from one that is still to be put in place, and the rest of a replaced output from an unrelated folder.
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
"""In the partial folder of an output that is filled in place: the old contents of the output."""
_NOT_RENAMED = {errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES}


def put_in_place(place: Place, is_note: Callable[[str], bool]) -> None:
    """Put the finished partial folder in place. The old output is removed last, and then the files whose names
    `is_note` accepts.

    After an OSError, both the finished folder and the old output are intact.
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
        # A mount that was not detected, or a folder of a lower layer of a container.
        (partial / PLACING).unlink()
        _fill(place, is_note)
        return
    finish_placing(place, is_note)


def finish_placing(place: Place, is_note: Callable[[str], bool]) -> None:
    """Finish what a killed run left to do at or after its last rename. Does nothing if there was none."""
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
    """Remove the files that only a resumed run needs. The file that marks the folder as placed is removed last."""
    for path in folder.iterdir():
        if is_note(path.name) and path.name != PLACING:
            path.unlink()
    (folder / PLACING).unlink(missing_ok=True)


def _rename_twice(partial: Path, output: Path, backup: Path) -> None:
    """Rename the output away, then the partial folder to it, if the system cannot exchange folders in one step."""
    output.rename(backup)
    try:
        partial.rename(output)
    except OSError:
        backup.rename(output)
        raise


def _fill(place: Place, is_note: Callable[[str], bool]) -> None:
    """Move the files of the partial folder into the output. The old contents wait in the partial folder."""
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
    for path in sorted(new, key=lambda path: path.name == "run.json"):  # last: run.json makes the output complete
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
    """The device and inode number of a folder, which a rename does not change."""
    if path is None:
        return None
    with suppress(OSError):
        found = os.lstat(path)
        return [found.st_dev, found.st_ino]
    return None
