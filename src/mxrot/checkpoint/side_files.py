"""Files of a model folder that are copied unchanged into its checkpoint: the tokenizer, chat templates, licences.

They are found and checked before any work, so that they cannot stop a run at its end. Folders are left out, except the
one in which transformers keeps additional chat templates. Every file that could be executed or unpickled is left out,
too.
"""

from __future__ import annotations

import os
import stat
from fnmatch import fnmatchcase
from pathlib import Path

from mxrot.checkpoint.files import whole_file
from mxrot.errors import FamilyError
from mxrot.models import WeightFiles

TEMPLATES = "additional_chat_templates"
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.codes",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
    "*processor_config.json",
    "license*",
    "licence*",
    "copying*",
    "notice*",
    "use_policy*",
)
"""In lower case; names are compared in lower case."""
_NEVER = (
    "*.py",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.pickle",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
)
_WRITTEN_ANEW = {"config.json", "README.md", "recipe.toml", "run.json"}
_PIECE = 1 << 22


def is_side_file(name: str) -> bool:
    """True if a file of this name is copied unchanged into the checkpoint."""
    small = name.lower()
    return any(fnmatchcase(small, one) for one in _COPIED) and not any(fnmatchcase(small, one) for one in _NEVER)


def find_side_files(source: Path) -> list[Path]:
    """The side files of a model folder. FamilyError if one is not a readable regular file."""
    found = []
    for path in [*sorted(source.iterdir()), *sorted((source / TEMPLATES).glob("*.jinja"))]:
        if is_side_file(path.name) and not path.is_dir():
            _check_readable(path)
            found.append(path)
    return found


def left_out(source: Path) -> list[str]:
    """Names in a model folder that have no counterpart in its checkpoint. Folders end with a slash."""
    here = {path.relative_to(source).parts[0] for path in find_side_files(source)}
    here |= {path.name for path in WeightFiles(source).files} | _WRITTEN_ANEW
    others = (path for path in source.iterdir() if path.name not in here and not path.name.endswith(".index.json"))
    return sorted(path.name + "/" * path.is_dir() for path in others if not path.name.startswith("."))


def copy_file(path: Path, target: Path) -> None:
    """Copy a side file. DiskFullError if there is no space left."""
    target.parent.mkdir(exist_ok=True)
    with path.open("rb") as file, whole_file(target, path.stat().st_size) as sink:
        while piece := file.read(_PIECE):
            sink.write(piece)


def _check_readable(path: Path) -> None:
    where = f"{path}: goes into the checkpoint"
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):  # opening a FIFO would wait for a writer
            raise FamilyError(f"{where}, and is not a regular file; put the file there, or move it away")
        os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError as error:
        raise FamilyError(f"{where}, and is a link to nothing; is the download complete?") from error
    except OSError as error:
        raise FamilyError(f"{where}, and cannot be read ({error.strerror}); repair it, or move it away") from error
