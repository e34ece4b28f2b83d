"""The cache folder of mxrot: $MXROT_CACHE, otherwise ~/.cache/mxrot. It holds only what can be made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The folder of the cache. Without a home folder, as in some containers, it is a temporary folder."""
    named = os.environ.get("MXROT_CACHE")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "mxrot"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "mxrot"
