"""Checks that the files of a checkpoint are those that mxrot has written. run.json has the size and the SHA-256 of
each.

Files that `save_pretrained` writes are another checkpoint. It has no run.json, or an older one whose files were
replaced.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mxrot.checkpoint.contents import Stored
from mxrot.checkpoint.files import INDEX, file_in, sha256_of
from mxrot.documents import check_regular, read_json, read_text
from mxrot.errors import CheckpointError, ConfigError
from mxrot.recipe import Recipe

MOST_HASHED_BYTES = 1_000_000_000
"""By default, weights up to this many bytes are hashed, which takes about a second (docs/checkpoint.md)."""
_THREADS = 4
_UNREAD = ("*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files that only people read, not programs."""


@dataclass(frozen=True)
class Records:
    """What mxrot has recorded about a checkpoint."""

    recipe: Recipe
    run: dict[str, Any] | None
    """run.json. None if its files were replaced later."""


def read_records(folder: Path, stored: Stored, was_saved_again: bool = False) -> Records | None:
    """The records in a folder. None for a checkpoint that only `save_pretrained` has written.

    CheckpointError if one of the two is missing, or cannot be read. With `was_saved_again`, `save_pretrained` wrote
    last. Other records then belong to an earlier checkpoint, perhaps of another model, and are not read.
    """
    if was_saved_again:
        return None
    there = [name for name in ("run.json", "recipe.toml") if (folder / name).exists()]
    if not there:
        return None
    run = read_json(folder / "run.json")
    try:
        recipe = Recipe.from_toml(read_text(folder / "recipe.toml"), "recipe.toml")
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    listed = _listed(folder, run)
    weights = {path.name for path in stored.paths}
    is_current = weights <= listed.keys()
    return Records(recipe, run if is_current else None)


def _listed(folder: Path, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    listed = run.get("files")
    if not isinstance(listed, dict) or INDEX not in listed:
        raise CheckpointError(f"{folder / 'run.json'}: has no list of files")
    for name, entry in listed.items():
        is_whole = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not is_whole:
            raise CheckpointError(f"{folder / 'run.json'}: gives no size and SHA-256 of {name}")
    return listed


def check_files(folder: Path, records: Records | None, verify: bool | None = None) -> None:
    """CheckpointError unless all files of run.json exist, weights have their recorded size, and hashes match.

    `verify` selects the hashes to compare: True for all files, False for none, None for all that a program reads, with
    weights up to MOST_HASHED_BYTES in total. CheckpointError, too, if `verify` is True and there is nothing to compare
    with.
    """
    if records is None or records.run is None:
        if verify:
            raise CheckpointError(
                f"{folder}: holds no hashes of these files to verify; `mxrot quantize` writes them, save_pretrained "
                "does not"
            )
        return
    listed = _listed(folder, records.run)
    weights = 0
    for name, expected in listed.items():
        path = file_in(folder, name)
        if not path.exists():
            raise CheckpointError(f"{path}: is missing")
        found, wanted = check_regular(path), expected["bytes"]
        if path.suffix == ".safetensors":
            weights += found
            if found != wanted:
                raise CheckpointError(f"{path}: expected {wanted} bytes, got {found}; the file is truncated or altered")
    hashed = {file_in(folder, name): expected["sha256"] for name, expected in listed.items()}
    hashed = {path: digest for path, digest in hashed.items() if _is_hashed(path, weights, verify)}
    with ThreadPoolExecutor(_THREADS) as pool:
        found_digests = list(pool.map(sha256_of, hashed))
    for (path, digest), found_digest in zip(hashed.items(), found_digests, strict=True):
        if found_digest != digest:
            hint = "" if verify else "; verify=False (--no-verify) loads it all the same"
            raise CheckpointError(f"{path}: its SHA-256 is not the one in run.json; the file was altered{hint}")


def _is_hashed(path: Path, weights: int, verify: bool | None) -> bool:
    if verify is not None:
        return verify
    if path.suffix == ".safetensors":
        return weights <= MOST_HASHED_BYTES
    return not any(fnmatchcase(path.name, pattern) for pattern in _UNREAD)
