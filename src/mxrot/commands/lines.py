"""Lines on standard output, broken between words if a terminal is narrower."""

from __future__ import annotations

import shutil
import sys
import textwrap


def say(line: str) -> None:
    """Print a line. On a terminal it is broken between words, with the rest indented. A file gets it unchanged."""
    if not sys.stdout.isatty():
        print(line)
        return
    width = max(40, shutil.get_terminal_size().columns)
    for part in line.split("\n"):
        begin = part[: len(part) - len(part.lstrip())]
        print(
            textwrap.fill(part.strip(), width, initial_indent=begin, subsequent_indent=f"{begin}  ", **_WHOLE)  # type: ignore[arg-type]
        )


_WHOLE = {"break_long_words": False, "break_on_hyphens": False}
"""Keep paths and commands in one piece."""
