"""The log-likelihoods of a model, kept in a file so that an interrupted run can continue.

The file has one JSON value per line: first the owner of the answers, then [request, log-likelihood, greedy] for each
request, identified by the SHA-256 of its context and continuation. A line that was cut off by a kill is dropped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mxrot.calibration import World
from mxrot.errors import ConfigError

Answer = tuple[float, bool]
"""The log-likelihood of a continuation in nats, and whether greedy decoding gives this continuation."""


class Answers:
    """Answers by request, also kept in a file if one is given. Opened by `with`."""

    def __init__(self, path: Path | None = None, owner: dict[str, Any] | None = None, resume: bool = False) -> None:
        """`owner` holds all that decides the answers. Answers of another owner are refused.

        ConfigError for a file of another owner. Without `resume` the content of the file is discarded.
        """
        self._known: dict[str, Answer] = {}
        self._path = path
        self._owner = owner or {}
        self._file: IO[str] | None = None
        if path is not None and resume and path.exists():
            self._read(path)

    def __enter__(self) -> Answers:
        if self._path is not None:
            # A new file without the line that may be cut off. The old file stays until it is complete.
            unfinished = self._path.with_name(f"{self._path.name}.new")
            lines = [{"owner": self._owner}, *([request, *answer] for request, answer in self._known.items())]
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            unfinished.replace(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, request: tuple[str, str]) -> Answer | None:
        return self._known.get(_digest(request))

    def add(self, request: tuple[str, str], answer: Answer) -> None:
        name = _digest(request)
        self._known[name] = answer
        if self._file is not None:
            self._write([name, *answer])

    def shared_by(self, world: World) -> Answers:
        """These answers in the first process. In the others, a copy of them without a file."""
        known = world.hand_out(self._known)
        if not world.rank:
            return self
        found = Answers()
        found._known = known
        return found

    def remove(self) -> None:
        """Delete the file, because all requests have been scored."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self, value: Any) -> None:
        assert self._file is not None
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def _read(self, path: Path) -> None:
        values = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values.append(json.loads(line))
            except ValueError:
                break
        owner = values[0].get("owner") if values and isinstance(values[0], dict) else None
        if not isinstance(owner, dict):
            raise ConfigError(f"{path}: holds no answers; remove it, or start over without --resume")
        if owner != self._owner:
            differs = ", ".join(sorted(key for key in self._owner | owner if owner.get(key) != self._owner.get(key)))
            raise ConfigError(f"{path}: answers of a run with another {differs}; start over without --resume")
        self._known = {request: (value, greedy) for request, value, greedy in values[1:]}


def _digest(request: tuple[str, str]) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()
