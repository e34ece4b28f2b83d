"""The folder of a comparison: finished runs, each under a key of all that decides its figures, and the original's
states.

A run is a small file that is written whole or not at all. It is reused only if its key is the same: the bytes of the
model's files, the recipe, the windows of all texts, the seed, the device and the versions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mxrot.cache import cache_folder
from mxrot.calibration import ONE, World
from mxrot.checkpoint.fingerprint import hash_model
from mxrot.checkpoint.lock import held
from mxrot.checkpoint.named_file import write_named
from mxrot.errors import ConfigError
from mxrot.progress import Progress
from mxrot.report.rows import Run

FORMAT = 2
"""The format version of run files."""
Key = dict[str, Any]


def default_work_folder(model: Path, command: str = "compare") -> Path:
    """The default folder in the cache, one for each model folder and command."""
    digest = hashlib.sha256(str(model.resolve()).encode(errors="surrogateescape")).hexdigest()[:12]
    return cache_folder() / command / f"{model.name[:60] or 'model'}-{digest}"


class WorkFolder:
    """A folder for one comparison at a time. See `opened`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, world: World = ONE) -> Iterator[WorkFolder]:
        """Open the folder, made if necessary, for this process alone. Of several processes, the first one holds it for
        all.

        ConfigError if it is a file, CheckpointError if another process works there.
        """
        if world.rank:
            yield cls(folder)
            return
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--work {folder}: is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder / "lock", folder):
            yield cls(folder)

    def hashes(self, model: Path, progress: Progress) -> dict[str, str]:
        """The SHA-256 of the model's files. Files unchanged since an earlier comparison are not read again."""
        path = self.folder / f"stamps-{_digest(str(model.resolve()))}.json"
        found, stamps = hash_model(model, _table(path).get("stamps"), progress)
        _write(path, {"stamps": _json(stamps)})
        return found

    def find(self, key: Key) -> Run | str | None:
        """The run of this key, or the reason why there is none. None if it is not finished."""
        table = _table(self._path(key))
        if table.get("format") != FORMAT or table.get("key") != _json(key):
            return None
        try:
            return str(table["reason"]) if table["run"] is None else Run.from_json(table["run"])
        except (KeyError, TypeError, AttributeError):
            return None

    def keep(self, key: Key, found: Run | str) -> None:
        """Keep a finished run, or the reason why there is none."""
        is_run = isinstance(found, Run)
        run, reason = (found.to_json(), None) if is_run else (None, found)  # type: ignore[union-attr]
        self._path(key).parent.mkdir(exist_ok=True)
        _write(self._path(key), {"format": FORMAT, "key": key, "run": run, "reason": reason})

    def forget(self, key: Key) -> None:
        """Remove the run, as if it had not been finished."""
        self._path(key).unlink(missing_ok=True)

    def states(self, key: Key, rank: int = 0) -> Path:
        """The folder of the original's hidden states while they are needed. `key` is that of its run. Each process has
        its own."""
        return self.folder / "original" / (_digest(key) + (f"-{rank}" if rank else ""))

    def drop_states(self) -> None:
        """Delete the states of all processes."""
        shutil.rmtree(self.folder / "original", ignore_errors=True)

    def _path(self, key: Key) -> Path:
        return self.folder / "runs" / f"{_digest(key)}.json"


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]


def _json(value: Any) -> Any:
    """The value as it is read back from a JSON file."""
    return json.loads(json.dumps(value))


def _table(path: Path) -> dict[str, Any]:
    """The table in a file. Empty if the file does not exist or holds no table."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, table: dict[str, Any]) -> None:
    write_named(path, (json.dumps(table) + "\n").encode())
