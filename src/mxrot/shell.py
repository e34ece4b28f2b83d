"""What a shell does: words of commands, and homes of users in paths."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(*words: str | Path) -> str:
    """One line that a shell takes apart into these words again; a path that starts with a hyphen is no option."""
    return shlex.join(
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words
    )


def is_utf8(path: str | Path) -> bool:
    """Is the name UTF-8? Others are taken by Python, and by no reader of safetensors or tokenizers."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def expanded(path: str | Path) -> Path:
    """With a home for ~, as a shell has it: of a user that is not there it stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
