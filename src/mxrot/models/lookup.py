"""From what a user calls a model to a folder on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mxrot.errors import FamilyError
from mxrot.models.demo import demo_folder
from mxrot.models.folder import check_folder, what_else
from mxrot.nearest import brief
from mxrot.shell import expanded, is_utf8

DEMO = "demo"
_WANTED = [
    *("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "recipe.toml"),
    *("*.tiktoken", "*.codes", "*.spm", "vocab*", "merges*"),  # of tokenizers that are in no tokenizer.json
    *("README.md", "LICENSE*", "license*", "COPYING*", "NOTICE*", "USE_POLICY*"),  # for what is made of it
]
_UNWANTED = ["consolidated*", "*/*.safetensors", "original/*", "onnx/*", "*.gguf", "*.bin", "*.pth", "*.pt"]
"""The weights once more: in Mistral's and Meta's own layouts, for other programs, or pickled."""
_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]
"""Of the library that asks the hub, which is httpx or httpx2: what it raises without a connection, too."""
_HUB = "https://huggingface.co"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SECONDS = 10.0


def find_model(name: str) -> Path:
    """The folder of `demo`, of a local path, or of a hub id (downloaded, safetensors only).

    A hub id may name a branch, tag or commit: owner/name@revision. FamilyError if there is no such thing, with what to
    do.
    """
    if name == DEMO:
        return demo_folder()
    path = _local(name)
    if path.is_dir():
        return path
    if path.exists():
        check_folder(path)
    model, revision = hub_id(name)

    def download() -> str:
        return snapshot_download(model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)

    return _from_hub(model, revision, download)


def find_config(name: str) -> Path:
    """Where the config.json of a model is: the file, or a folder that holds it.

    As for `find_model`, but of a hub id nothing else is downloaded, and the path may name the file itself.
    """
    path = _local(name)
    if name == DEMO or path.is_dir():
        return find_model(name)
    if path.suffix == ".json" and path.is_file():
        return path
    if path.exists():
        check_folder(path)
    model, revision = hub_id(name)
    return _from_hub(model, revision, lambda: hf_hub_download(model, "config.json", revision=revision))


def _local(name: str) -> Path:
    """The path of that name; FamilyError if there can be nothing."""
    if not name.strip():
        raise FamilyError("the name of the model is empty; give a folder, a hub id, or `demo`")
    if not is_utf8(name):
        raise FamilyError(f"{name}: the name is not UTF-8, and no reader of tokenizers takes it; rename the folder")
    path = expanded(name)
    try:
        path.exists()
    except OSError as error:  # as for a name that is too long
        raise FamilyError(f"{brief(name)}: no such model folder ({error.strerror})") from error
    return path


def hub_id(name: str) -> tuple[str, str | None]:
    """The id and the revision in owner/name or owner/name@revision; FamilyError for anything else."""
    model, _, revision = name.partition("@")
    if "://" in name:
        raise FamilyError(f"{name}: is a URL; {_without_url(name)}")
    if name.startswith((".", "/", "~")) or not _NAME.fullmatch(model) or name.endswith("@"):
        raise FamilyError(
            f"{name}: no such model folder (a hub id looks like owner/name or owner/name@revision; the demo model is "
            "`demo`)"
        )
    return model, revision or None


def is_on_hub(name: str) -> bool:
    """Can only the hub have a model of this name?"""
    return name != DEMO and not _local(name).exists() and _NAME.fullmatch(name.partition("@")[0]) is not None


def commit_of(folder: Path) -> str | None:
    """The commit of the hub that a folder of its cache holds; None for any other folder."""
    is_commit = re.fullmatch(r"[0-9a-f]{40}", folder.name) is not None
    return folder.name if is_commit and folder.parent.name == "snapshots" else None


def download_note(name: str) -> str:
    """A line on what `find_model` is about to fetch: how much of what; as far as the hub can be asked for it.

    FamilyError if the hub has the model, and no weights that can be read.
    """
    model, revision = hub_id(name)
    try:
        found = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=_SECONDS)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, _HTTPError, OSError, ValueError):
        return f"Getting {name} from the hub, unless it is here already"  # what is wrong is said by who gets it
    files = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    chosen = [size for file, size in files.items() if is_wanted(file)]
    if not any(file.endswith(".safetensors") and is_wanted(file) for file in files):
        raise FamilyError(f"{name}: holds no weights in safetensors{what_else(sorted(files))}")
    return f"Getting {name} from the hub, unless it is here already: {len(chosen)} files, {sum(chosen) / 1e9:.2f} GB"


def is_wanted(file: str) -> bool:
    """Is a file of this name in a repository downloaded?"""
    return any(fnmatch(file, p) for p in _WANTED) and not any(fnmatch(file, p) for p in _UNWANTED)


def _from_hub(model: str, revision: str | None, download: Callable[[], str]) -> Path:
    """What `download` gives; FamilyError if the hub refuses, with what to do."""
    try:
        return Path(download())
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, _HTTPError, OSError) as error:
        named = model if revision is None else f"{model}@{revision}"
        raise FamilyError(f"{named}: {_refusal(error, model, revision)}") from error


def _refusal(error: Exception, model: str, revision: str | None) -> str:
    """Why the hub did not give a model, and what to do."""
    if isinstance(error, GatedRepoError):
        return f"is gated on the hub: ask for access at {_HUB}/{model}, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "no such folder, and no such model on the hub; check the spelling, and if the model is private log in with "
            "`hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it; its branches are listed at {_HUB}/{model}/tree/main"
    is_of_connection = isinstance(error, _HTTPError) and not isinstance(error, HfHubHTTPError)
    if is_of_connection or isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return (
            f"no such folder, it is not in the cache of the hub, and {cause}; get it where there is a connection, with "
            f"`hf download {model}`"
        )
    if isinstance(error, EntryNotFoundError):
        return f"has no config.json on the hub; is it a model for transformers? See {_HUB}/{model}/tree/main"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"no such folder, and the hub did not give it: {first}"


def _without_url(name: str) -> str:
    """What to give in place of it."""
    found = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", name)
    if found:
        return f"give the hub id: {found[1]}"
    return "give a folder on this machine, or a hub id, which looks like owner/name"
