"""Where mxrot keeps what it can make again: $MXROT_CACHE, else ~/.cache/mxrot."""

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
