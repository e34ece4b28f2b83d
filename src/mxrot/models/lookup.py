"""From what a user calls a model to a folder on disk."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mxrot.errors import FamilyError
from mxrot.models.demo import demo_folder

DEMO = "demo"
_WANTED = [
    *("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "recipe.toml"),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),  # for the card of what is made of it
]


def find_model(name: str) -> Path:
    """The folder of `demo`, of a local path, or of a hub id (downloaded, safetensors only).

    FamilyError if there is no such thing.
    """
    if name == DEMO:
        return demo_folder()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FamilyError(f"{name}: is a file; expected a model folder, a hub id, or `demo`")
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FamilyError(f"{name}: no such model folder (a hub id looks like owner/name; the demo model is `demo`)")
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FamilyError(f"{name}: no such folder, and the hub did not give it: {first_line}") from error
