"""Upload a checkpoint to the hub, with its card."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from mxrot.checkpoint.checked import check_checkpoint
from mxrot.errors import CheckpointError, ConfigError

HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
"""The base error of the hub's HTTP library. It is also raised without a connection."""
FOLDER_IN_CARD = "path/to/this/folder"
"""The path in a card's examples until the checkpoint has a name on the hub."""


def publish(folder: Path, repository: str, *, private: bool = False, message: str = "") -> str:
    """Upload the files that run.json lists, and run.json. Returns the address of the commit.

    The card names the repository in its examples. No other file of the folder is uploaded, and the folder does not
    change. The hashes of all files are compared first: CheckpointError if a file is not what was written, or if there
    are no files. ConfigError if the name is not valid on the hub, or if the hub refuses.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository}: not the name of a repository, such as owner/name") from error
    check_checkpoint(folder, verify=True)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    card = card_for(folder, repository)
    run["files"]["README.md"] = {"bytes": len(card), "sha256": sha256(card).hexdigest()}
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            operations=[
                _addition("README.md", card),
                _addition("run.json", (json.dumps(run, indent=2) + "\n").encode()),
                *(_addition(name, folder / name) for name in run["files"] if name != "README.md"),
            ],
            commit_message=message or "Checkpoint of mxrot",
        )
    except (HTTP_ERROR, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{repository}: the hub refuses ({said[0][:200]}); log in with `hf auth login`") from error
    return str(commit.commit_url)


def card_for(folder: Path, repository: str) -> bytes:
    """The card of the checkpoint with its name on the hub. CheckpointError if it has no card."""
    path = folder / "README.md"
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; a checkpoint is published with its card")
    return path.read_text(encoding="utf-8").replace(FOLDER_IN_CARD, repository).encode()


def missing_in_card(folder: Path) -> list[str]:
    """What the card lacks for readers on the hub, one line each."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text, ignore_metadata_errors=True).data
    found = []
    if not getattr(data, "base_model", None):
        found.append("the card names no base_model; add it to the header of README.md")
    if getattr(data, "license", None) in (None, "unknown"):
        found.append("the card names no license; add that of the original to the header of README.md")
    if "\nNot measured yet" in text:
        found.append("the card has no figures; `mxrot report DIR --against ORIGINAL --card` adds them")
    return found


def _addition(name: str, content: bytes | Path) -> CommitOperationAdd:
    return CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
