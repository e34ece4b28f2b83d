"""Disk space, checked before a run and before each block, so that a filling disk is noticed before it is full.

Both checks count the same: everything that a run writes, minus what is there already. A run that is stopped here would
therefore also be refused if it were resumed before space is free. A run that was allowed to start is stopped only if
other programs have filled the disk.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mxrot.errors import DiskFullError


@dataclass(frozen=True)
class Room:
    """The bytes that a run in a folder has to write, and the disk that must hold them."""

    shown: Path
    """The output path as the user gave it, for messages."""
    partial: Path
    """The working folder."""
    disk: Path
    """An existing folder on the same disk."""
    needed_bytes: float
    """The maximum number of bytes in total. 0 if unknown."""

    def check(self) -> None:
        """DiskFullError unless the bytes that are still to be written fit."""
        self.check_for(self._still())

    def check_for(self, size: float) -> None:
        """DiskFullError unless `size` bytes fit, even if later files would not: finished work is kept first. The
        message gives all bytes that are still to be written."""
        free = self._free()
        if free is not None and size > free:
            still = max(size, self._still())
            raise DiskFullError(
                f"{self.shown}: {_gigabytes(still)} are to be written there, and {_gigabytes(free)} are free; make "
                f"room for {_gigabytes(still - free)} more, or give a folder on another disk"
            )

    def _still(self) -> float:
        """Bytes that are not written yet."""
        there = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        return self.needed_bytes - there

    def _free(self) -> int | None:
        """Free bytes. None if the file system does not say."""
        disk = shutil.disk_usage(self.disk)
        return disk.free if disk.total else None


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
