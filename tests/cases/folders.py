"""What is in folders."""

from __future__ import annotations

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder but run.json, which holds times; a link counts as where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path.relative_to(folder).as_posix()] = f"-> {path.readlink()}".encode()
        elif path.is_file() and path.name != "run.json":
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found
