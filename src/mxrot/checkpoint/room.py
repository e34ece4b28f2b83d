"""Room on the disk: looked at before a run and before each block, so that a disk is seen to fill up before it is full.

Both looks count alike: what a run writes in all, less what is there already. So a run that is stopped here would be
refused, too, if it were resumed before there is room, and one that was let begin is stopped only where somebody else
has filled the disk.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mxrot.errors import DiskFullError


@dataclass(frozen=True)
class Room:
    """What a run that works in a folder has to write, and the disk that it is to fit on."""

    shown: Path
    """The output as the user has it, for messages."""
    partial: Path
    """The folder to work in."""
    disk: Path
    """A folder on the same disk that is there."""
    needed_bytes: float
    """The most bytes in all. 0 if unknown."""

    def check(self) -> None:
        """DiskFullError unless what is still to be written fits."""
        self.check_for(self._still())

    def check_for(self, size: float) -> None:
        """DiskFullError unless so many bytes fit, also where what comes after them would not: what was made is kept
        first. It says what is still to be written in all."""
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
        """None where the file system does not tell."""
        disk = shutil.disk_usage(self.disk)
        return disk.free if disk.total else None


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
