"""Exchange two folders in one step, if the system can."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h of macOS
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one atomic step. False, with nothing changed, if the system cannot do this.

    OSError as for any rename.
    """
    call = _call_of_system()
    if call is None:
        return False
    if sys.platform == "darwin":
        failed = call(os.fsencode(one), os.fsencode(other), _RENAME_SWAP)
    else:
        failed = call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _call_of_system() -> ctypes._NamedFuncPointer | None:
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform)
    if name is None:
        return None
    # Old C libraries do not have this function.
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)
