"""Output files at a path that the user names: JSON tables, reports, pictures."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from mxrot.errors import DiskFullError


def write_named(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. The old file stays until the new one is complete, and a link stays a link.

    A pipe or a device, such as `/dev/stdout`, is written directly; so is a file in a folder that accepts no new names.
    DiskFullError if there is no space left.
    """
    real = path.resolve()
    fresh = real.with_name(f".{real.name[:200]}.{os.getpid()}.tmp")
    try:
        # Do not test the real path: a pipe behind /dev/stdout has none.
        if path.exists() and not (path.is_file() and os.access(real.parent, os.W_OK)):
            path.write_bytes(data)
            return
        with fresh.open("xb") as file:
            file.write(data)
        with suppress(FileNotFoundError):
            shutil.copymode(real, fresh)
        fresh.replace(real)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{path}: no space left on the device for {len(data) / 1e6:.1f} MB") from error
        raise
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
