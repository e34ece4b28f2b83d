"""Data of tasks in a folder, for machines without access to the hub.

DIR/DATASET/CONFIGURATION/SPLIT is a data set saved by `datasets`. DIR/NAME_SPLIT.jsonl has one record per line. DATASET
is the last part of the name on the hub (`allenai/ai2_arc`: ai2_arc). NAME is the same, whole or up to an underscore
(`EleutherAI/lambada_openai`: lambada_openai, lambada). If a task names no configuration, the folder of the only one can
have any name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mxrot.errors import DataError

_LINES = re.compile(r"(.+)_(train|validation|test)\.jsonl")


def local_splits(folder: Path, dataset: str, configuration: str | None) -> dict[str, Any]:
    """The splits of a data set in `folder`, in memory, by name. DataError if there is none."""
    name = dataset.split("/")[-1]
    found = _saved_splits(folder / name, configuration)
    for path in sorted(folder.glob("*.jsonl")):
        match = _LINES.fullmatch(path.name)
        if match and (name == match[1] or name.startswith(f"{match[1]}_")):
            found.setdefault(match[2], _records(path))
    if not found:
        raise DataError(f"{folder}: has neither {name}/CONFIGURATION/SPLIT, saved by datasets, nor {name}_SPLIT.jsonl")
    return found


def _saved_splits(folder: Path, configuration: str | None) -> dict[str, Any]:
    if not folder.is_dir():
        return {}
    present = sorted(path.name for path in folder.iterdir() if path.is_dir())
    fits = [name for name in present if configuration in (None, name)]
    if len(fits) != 1:
        wanted = f"the folder {configuration}" if configuration else "one folder"
        raise DataError(f"{folder}: expected {wanted}, got {', '.join(present) or 'none'}")
    from datasets import load_from_disk

    splits = {}
    for path in sorted(path for path in (folder / fits[0]).iterdir() if (path / "dataset_info.json").is_file()):
        try:
            # In memory, because results computed from one on disk would be written beside it.
            splits[path.name] = load_from_disk(str(path), keep_in_memory=True)
        except Exception as error:  # of pyarrow, datasets or the file system
            raise DataError(f"{path}: datasets cannot load it: {str(error).strip().splitlines()[0]}") from error
    return splits


def _records(path: Path) -> Any:
    """The lines of a file as a data set."""
    from datasets import Dataset

    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(records[-1], dict):
            raise DataError(f"{path}: line {number} is not an object")
    if not records:
        raise DataError(f"{path}: holds no record")
    return Dataset.from_list(records)
