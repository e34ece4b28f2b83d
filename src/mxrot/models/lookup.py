"""From what a user calls a model to a folder on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mxrot.errors import FamilyError
from mxrot.models.demo import demo_folder
from mxrot.models.folder import check_folder

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
        check_folder(path)
    return _from_hub(name, lambda: snapshot_download(name, allow_patterns=_WANTED))


def find_config(name: str) -> Path:
    """Where the config.json of a model is: the file, or a folder that holds it.

    As for `find_model`, but of a hub id nothing else is downloaded, and the path may name the file itself.
    """
    path = Path(name).expanduser()
    if name == DEMO or path.is_dir():
        return find_model(name)
    if path.suffix == ".json" and path.is_file():
        return path
    if path.exists():
        check_folder(path)
    return _from_hub(name, lambda: hf_hub_download(name, "config.json"))


def _from_hub(name: str, download: Callable[[], str]) -> Path:
    """What `download` gives, for a name that may be a hub id; FamilyError if it is none, or the hub refuses."""
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FamilyError(f"{name}: no such model folder (a hub id looks like owner/name; the demo model is `demo`)")
    try:
        return Path(download())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FamilyError(f"{name}: no such folder, and the hub did not give it: {first_line}") from error
