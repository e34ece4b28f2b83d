"""Texts, and the token windows that calibration and evaluation see.

A text is `demo` (the reference manual that comes with the running Python), a file (.txt, .raw, .jsonl, .parquet;
records by their "text" field), NAME=FILE, or a hub data set (`wikitext2`, `c4`) where `datasets` is installed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mxrot.errors import ConfigError, DataError

Role = Literal["calibration", "evaluation"]
_DEMO_CALIBRATION_SHARE = 0.7


@dataclass(frozen=True)
class Text:
    """A named text."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """SHA-256 of its UTF-8 bytes."""
        return sha256(self.content.encode()).hexdigest()


def load_text(spec: str, role: Role) -> Text:
    """The text that `spec` names. `demo` and hub data sets have a part for each role, without overlap.

    DataError if it does not exist, cannot be read or is empty; ConfigError if a package is missing for it.
    """
    name, path = _split_name(spec)
    if path == "demo":
        return Text(name or "demo", _demo_text(role))
    if path in _HUB and not Path(path).exists():
        return Text(name or path, _hub_text(path, role))
    content = _read_file(Path(path).expanduser())
    if not content.strip():
        raise DataError(f"{path}: the text is empty")
    return Text(name or Path(path).stem, content)


def token_windows(
    text: Text, tokenizer: Any, seq_len: int, limit: int | None, spread: bool = False, start: int | None = None
) -> Tensor:
    """Windows of `seq_len` tokens without overlap, int64 [W, seq_len]; the tail that fills none is dropped.

    The text is tokenized once, as one string. With a `limit` the first ones are kept, or with `spread` evenly
    spaced ones. A token `start` stands before the text of each, and takes the place of those that the tokenizer adds.
    DataError if the text does not fill one window.
    """
    if seq_len < 2:
        raise ConfigError(f"seq_len must be at least 2, got {seq_len}")
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of windows must be positive, got {limit}")
    options = {} if start is None else {"add_special_tokens": False}
    ids = torch.tensor(tokenizer(text.content, verbose=False, **options)["input_ids"], dtype=torch.int64)
    length = seq_len - (start is not None)
    count = len(ids) // length
    if count == 0:
        raise DataError(
            f"{text.name}: {len(ids)} tokens do not fill one window of {seq_len}; "
            "give a longer text or a smaller --seq-len"
        )
    windows = ids[: count * length].view(count, length)
    if start is not None:
        windows = F.pad(windows, (1, 0), value=start)
    if limit is None or limit >= count:
        return windows
    kept = torch.arange(limit) * count // limit if spread else torch.arange(limit)
    return windows[kept]


def _split_name(spec: str) -> tuple[str, str]:
    """NAME=FILE in two; no name for a file that has the equals sign in its own path."""
    if "=" not in spec or Path(spec).expanduser().is_file():
        return "", spec
    name, _, path = spec.partition("=")
    return name, path


def _demo_text(role: Role) -> str:
    """Python's reference manual, each paragraph once (however it is indented), cut into two parts."""
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    paragraphs.pop("", None)
    ordered = list(paragraphs.values())
    cut = int(len(ordered) * _DEMO_CALIBRATION_SHARE)
    return "\n\n".join(ordered[:cut] if role == "calibration" else ordered[cut:])


def _read_file(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such text file (known names: demo, {', '.join(_HUB)})")
    try:
        if path.suffix == ".jsonl":
            return "\n\n".join(_json_texts(path.read_text(encoding="utf-8")))
        if path.suffix == ".parquet":
            _require("pyarrow", f"reading {path.name}")
            import pyarrow.parquet

            return "\n\n".join(pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist())
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix or 'text'}: {error}") from error


def _json_texts(content: str) -> Iterator[str]:
    """The "text" of each line; ValueError names a line that has none."""
    # Not splitlines(): a JSON string may hold U+2028 and other line breaks as they are.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'line {number} is not an object with a string "text"')
        yield record["text"]


_HUB: dict[str, dict[str, Any]] = {
    "wikitext2": {
        "path": "Salesforce/wikitext",
        "name": "wikitext-2-raw-v1",
        "splits": {"calibration": "train", "evaluation": "test"},
    },
    "c4": {
        "path": "allenai/c4",
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        "splits": {"calibration": "train", "evaluation": "validation"},
    },
}


def _hub_text(name: str, role: Role) -> str:
    _require("datasets", f"the data set {name}")
    from datasets import load_dataset

    entry = dict(_HUB[name])
    split = entry.pop("splits")[role]
    try:
        records = load_dataset(**entry, split=f"{split}[:2000]" if name == "c4" else split)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: the hub did not give it: {str(error).splitlines()[0]}") from error
    return "\n\n".join(records["text"])


def _require(package: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{purpose} needs the package {package}: pip install 'mxrot[data]'")
