"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mxrot.documents import check_is_here
from mxrot.errors import FamilyError

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files of which a tokenizer needs one. Without any, transformers makes an empty one for some families."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; FamilyError, with what to do, if there is none, or none that can be read."""
    found = [path for pattern in _VOCABULARIES for path in sorted(folder.glob(pattern))]
    if not found:
        raise FamilyError(
            f"{folder}: has no tokenizer; expected tokenizer.json, tokenizer.model, or vocab.json and merges.txt: copy "
            "them and tokenizer_config.json from the model that this one was made from"
        )
    for path in (*found, *sorted(folder.glob("*token*.json"))):
        check_is_here(path)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        needed = "pip install sentencepiece protobuf" if found[0].suffix == ".model" else "install what it names"
        raise FamilyError(
            f"{folder}: its tokenizer ({found[0].name}) needs a package that is missing here ({_first_line(error)}); "
            f"{needed}, or save it as tokenizer.json"
        ) from error
    except Exception as error:  # of the tokenizers library, which raises Exception itself, and of many parsers
        raise FamilyError(
            f"{folder}: transformers cannot read its tokenizer ({', '.join(path.name for path in found)}): "
            f"{_first_line(error)}; copy tokenizer.json and tokenizer_config.json from the original again"
        ) from error


def _first_line(error: Exception) -> str:
    """What an error of another package says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
