"""Conversions as in a shell: words to a command line, and ~ to a home folder."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(*words: str | Path) -> str:
    """One line that a shell splits into these words again. A path that starts with a hyphen is not an option."""
    return shlex.join(
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words
    )


def is_utf8(path: str | Path) -> bool:
    """True if the name is UTF-8. Python accepts other names, but readers of safetensors and tokenizers do not."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def expanded(path: str | Path) -> Path:
    """The path with a home folder for ~, as in a shell. If the user does not exist, it stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
