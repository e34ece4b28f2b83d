"""Where an output may stand, and how it gets there."""

from __future__ import annotations

import shutil
from pathlib import Path

from mxrot.errors import CheckpointError


def check_output(output: Path, force: bool) -> None:
    """CheckpointError if `output` is there and not an empty folder, unless `force` replaces it."""
    if output.name in ("", ".."):
        raise CheckpointError(f"{output}: has no name of its own; name the folder to be made")
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path}: is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise CheckpointError(f"{output}: exists and is not empty; use --force to replace it, or another folder")


def put_in_place(partial: Path, output: Path) -> None:
    """Put the finished folder in place; what stood there goes last."""
    old = output.with_name(output.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    replaces = output.exists()
    if replaces:
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if replaces:
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
