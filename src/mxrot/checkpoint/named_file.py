"""Files whose place a person has named: tables as JSON, reports, pictures."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from mxrot.errors import DiskFullError


def write_named(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: what stood there stays until all of it is written, and a link stays a link.

    A pipe or a device takes the data as they come, as `/dev/stdout` does; and so does a file in a folder that takes no
    new names. DiskFullError if there is no space left.
    """
    real = path.resolve()
    fresh = real.with_name(f".{real.name[:200]}.{os.getpid()}.tmp")
    try:
        # Not by its real path: that of a pipe behind /dev/stdout is none.
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
