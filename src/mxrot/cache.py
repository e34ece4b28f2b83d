"""Where mxrot keeps what it can make again: $MXROT_CACHE, else ~/.cache/mxrot."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    return Path(os.environ.get("MXROT_CACHE") or Path.home() / ".cache" / "mxrot")
