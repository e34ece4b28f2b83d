"""Tensors that a run keeps in order to resume, with a note of their hash. A changed file is never used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mxrot.checkpoint.files import sha256_of, write_json, write_tensors
from mxrot.documents import read_json
from mxrot.errors import CheckpointError, DamagedError
from mxrot.interrupts import interrupt_waits

NEW = "new-"
"""The prefix of a file that is unfinished, or not yet in its place."""


@dataclass(frozen=True)
class NotedTensors:
    """A file of tensors, with a note beside it."""

    path: Path
    what: str
    """A description for messages."""

    @property
    def note(self) -> Path:
        return self.path.with_suffix(".json")

    def load(self) -> dict[str, Tensor] | None:
        """The tensors, or None if there are none. CheckpointError if the file is not what `save` wrote."""
        if not self.path.is_file():
            return None
        digests = self._noted()
        if digests is None or sha256_of(self.path) not in digests:
            raise CheckpointError(
                f"{self.path}: {self.what} was changed after it was written; start over with --force and without "
                "--resume"
            )
        try:
            with interrupt_waits():
                return load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}); start over with --force") from error

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Replace the kept tensors. If the run is killed at any moment, either the old or the new tensors can be
        loaded."""
        before = (self._noted() or [])[:1] if self.path.is_file() else []
        fresh = self.path.with_name(NEW + self.path.name)
        try:
            written = write_tensors(fresh, tensors)
            write_json(self.note, {"sha256": [written.sha256, *before]})
            fresh.replace(self.path)
        finally:
            fresh.unlink(missing_ok=True)

    def _noted(self) -> list[Any] | None:
        try:
            digests = read_json(self.note).get("sha256")
        except DamagedError:
            return None
        return digests if isinstance(digests, list) else None
