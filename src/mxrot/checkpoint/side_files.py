"""Files of a model folder that go into its checkpoint as they are."""

from __future__ import annotations

from pathlib import Path

from mxrot.checkpoint.files import write_bytes

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def copy_side_files(source: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            write_bytes(folder / path.name, path.read_bytes())
