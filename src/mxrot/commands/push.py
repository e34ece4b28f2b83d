"""The command `mxrot push`."""

from __future__ import annotations

from typing import Annotated

import typer

from mxrot.commands.lines import say
from mxrot.commands.options import announce
from mxrot.errors import ConfigError


def push(
    model: Annotated[str, typer.Argument(help="Folder that mxrot quantize wrote")],
    repository: Annotated[str, typer.Argument(help="Repository of the Hugging Face hub, owner/name")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private")] = False,
    message: Annotated[str, typer.Option("--message", help="Commit message")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check, and say what would be uploaded")] = False,
) -> None:
    """Upload a checkpoint to the hub, with its card."""
    from pathlib import Path

    from mxrot.checkpoint import is_checkpoint, read_run
    from mxrot.checkpoint.publishing import missing_in_card, publish
    from mxrot.shell import expanded

    folder = Path(expanded(model))
    if not folder.is_dir() or not is_checkpoint(folder):
        raise ConfigError(f"{model}: not a folder that `mxrot quantize` wrote")
    for line in missing_in_card(folder):
        announce(f"mxrot: {line}")
    files = read_run(folder)["files"]
    size = sum(entry["bytes"] for entry in files.values())
    say(f"{folder} -> {repository}: {len(files) + 1} files, {size / 1e9:.2f} GB")
    if not dry_run:
        say(publish(folder, repository, private=private, message=message))
