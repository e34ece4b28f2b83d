"""Everything that decides the bits of a checkpoint.

Every byte of the weights is hashed. A file is not read again if its size, times and inode number are still those that a
run noted with its hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxrot.checkpoint.files import INDEX, sha256_of
from mxrot.environment import device_name, versions
from mxrot.kernels.choices import kernel_choices
from mxrot.models import WeightFiles
from mxrot.progress import Progress, silent
from mxrot.recipe import Recipe

FORMAT = 2
"""The version of the fingerprint itself. Version 1 hashed 4 KiB of each tensor."""
_THREADS = 4
_SECONDS_BETWEEN = 0.5

Stamps = dict[str, list[int | str]]
"""For each file its size, times and inode number, and the hash that it had then."""


def hash_files(
    folder: Path, paths: Sequence[Path], stamps: Stamps | None = None, progress: Progress = silent
) -> tuple[dict[str, str], Stamps]:
    """The SHA-256 of files by their names in a folder, several at once, and stamps that let the next call skip
    unchanged files."""
    known = stamps or {}
    names = [path.relative_to(folder).as_posix() for path in paths]
    sizes = {path: path.stat().st_size for path in paths}
    all_bytes = sum(sizes.values())
    read: list[int] = []  # bytes of each piece; appending is safe from many threads

    def hash_of(name: str, path: Path) -> list[int | str]:
        stamp, noted = _stamp(path), known.get(name)
        if noted is not None and noted[:-1] == stamp:
            read.append(sizes[path])
            return noted
        return [*stamp, sha256_of(path, read.append)]

    pool = ThreadPoolExecutor(_THREADS)
    try:
        futures = [pool.submit(hash_of, name, path) for name, path in zip(names, paths, strict=True)]
        while wait(futures, _SECONDS_BETWEEN).not_done:
            progress(
                len(paths) * sum(read) / max(1, all_bytes), len(paths), "reading the model's files for their hashes"
            )
        seen = {name: future.result() for name, future in zip(names, futures, strict=True)}
    finally:
        pool.shutdown(cancel_futures=True)
    return {name: str(stamp[-1]) for name, stamp in seen.items()}, seen


def hash_model(
    source: Path, stamps: Stamps | None = None, progress: Progress = silent
) -> tuple[dict[str, str], Stamps]:
    """The same for the files of a model: its config, its weights and their index."""
    index = [path for path in (source / INDEX,) if path.is_file()]
    return hash_files(source, [source / "config.json", *index, *WeightFiles(source).files], stamps, progress)


def _stamp(path: Path) -> list[int | str]:
    found = path.stat()
    # ctime changes with anything about the file, and nobody can set it back.
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def fingerprint_of(
    files: dict[str, str],
    side_files: dict[str, str],
    recipe: Recipe,
    windows: Tensor | None,
    device: torch.device | str,
    seed: int,
    changes: Sequence[str] = (),
    ranks: int = 1,
) -> dict[str, Any]:
    """The fingerprint of a run with this number of processes (`ranks`). It quantizes a model whose `files` have these
    hashes, by name, after these `changes` of its source."""
    device = torch.device(device)
    data = None if windows is None else hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return {
        "format": FORMAT,
        "model": files | dict.fromkeys(changes, "applied"),
        "side_files": side_files,
        "recipe": hashlib.sha256(recipe.to_toml().encode()).hexdigest(),
        "windows": data,
        "seed": seed,
        "device": device_name(device),
        "kernels": kernel_choices(device),
        "versions": versions(),
        "ranks": [ranks],
    }


def going_on(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of a run that continues the run of `found`. It has the numbers of processes of both."""
    before: list[int] = found.get("ranks", [1])
    return {**wanted, "ranks": [*before, *(one for one in wanted["ranks"] if before[-1:] != [one])]}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """How a run differs from the fingerprint `found`, in words. A different number of processes does not count."""
    if found.get("format") != FORMAT:
        return ["version of mxrot"]
    said = []
    for key in sorted(wanted.keys() - {"ranks"}):
        one, other = found.get(key), wanted[key]
        if one == other:
            continue
        name = key.replace("_", " ")
        if isinstance(one, dict) and isinstance(other, dict):
            parts = sorted(part for part in one.keys() | other.keys() if one.get(part) != other.get(part))
            name += f" ({', '.join(parts)})"
        said.append(name)
    return said
