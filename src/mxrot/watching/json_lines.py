"""A file with one JSON object in each line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

from mxrot.watching.watch import Event


class JsonLines:
    """Writes each event immediately. The first event creates the file. A resumed run appends to it."""

    def __init__(self, path: Path, goes_on: bool) -> None:
        self.path, self._goes_on = path, goes_on
        self._file: IO[bytes] | None = None

    def hear(self, event: Event) -> None:
        """Append one line. It is handed to the system when this returns."""
        if self._file is None:
            self._file = self._opened()
        self._file.write(json.dumps(finite(event), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _opened(self) -> IO[bytes]:
        if not self._goes_on or not self.path.exists():
            return self.path.open("wb")
        file = self.path.open("r+b")
        kept = file.read()
        file.seek(kept.rfind(b"\n") + 1)  # a line that a kill has torn is no JSON
        file.truncate()
        return file


def finite(value: Any) -> Any:
    """The value with None instead of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
