"""The common parts of commands: options, checks, and functions to print and write."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxrot import interrupts
from mxrot.commands.completion import complete_recipe
from mxrot.commands.lines import say
from mxrot.errors import ConfigError
from mxrot.nearest import brief
from mxrot.tables import key_and_value

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Model = Annotated[str, typer.Argument(help="Hugging Face id, folder, or demo")]
REVISION_HELP = "Branch, tag or commit of a hub id; the same as ID@REV"
Revision = Annotated[str | None, typer.Option("--revision", metavar="REV", help=REVISION_HELP)]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="Recipe name or TOML file", autocompletion=complete_recipe)
]
RECIPES_HELP = "Names or TOML files, comma-separated"
Recipes = Annotated[str, typer.Option("--recipes", help=RECIPES_HELP, autocompletion=complete_recipe)]
TEXT = "demo, a file, a folder, or a data set of the hub; NAME=TEXT names it"
DEFAULT_RECIPE = "mxrot"
Calib = Annotated[
    list[str], typer.Option("--calib", metavar="TEXT", help="Calibration text, repeatable; FILE@2 has weight 2")
]
Samples = Annotated[
    int | None, typer.Option("--samples", min=1, help="Maximum number of calibration windows (default: the recipe's)")
]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="Maximum number of windows (default: all)")]
Texts = Annotated[list[str], typer.Option("--text", metavar="TEXT", help=f"Evaluation text, repeatable: {TEXT}")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all random numbers")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda (default: the GPU if there is one)")]
Verify = Annotated[
    bool | None,
    typer.Option("--verify/--no-verify", help="Check the SHA-256 of a checkpoint's files first (default: up to 1 GB)"),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON")]
TASKS_HELP = "Tasks of lm-eval, comma-separated, e.g. arc_easy,piqa"
Tasks = Annotated[str | None, typer.Option("--tasks", metavar="NAMES", help=TASKS_HELP)]
TaskData = Annotated[
    Path | None, typer.Option("--task-data", metavar="DIR", help="Folder with the data of the tasks (default: the hub)")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first N examples of each task")]
CHANGES_HELP = "Change a key of the recipe, repeatable, e.g. transform.sharing=block"
FAMILY_HELP = "auto: derive the family from the model's own class (default: the record of its architecture)"
FamilyOption = Annotated[str | None, typer.Option("--family", metavar="auto", help=FAMILY_HELP)]
Changes = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help=CHANGES_HELP)]

Purpose = Annotated[
    str | None, typer.Option("--for", metavar="PROGRAM", help="Choose the recipe that this program runs: vllm")
]

HEAD_HELP = "Quantize the head: mxint8, mxfp8, mxfp4, WEIGHTS/INPUTS as mxfp4/mxfp4, or none (default: as the recipe)"
Head = Annotated[str | None, typer.Option("--head", metavar="FORMAT", help=HEAD_HELP)]

KEPT = "mxrot.kept"
"""The key of the context's meta under which a command describes what an interrupt leaves behind."""


def chosen_recipe(name: str, changes: list[str], head: str | None = None) -> Any:
    """The recipe of that name or file, with the changes of `--set`, and the head of `--head`."""
    from mxrot.recipe import load_recipe

    wanted = dict(key_and_value(text, "--set") for text in changes)
    return load_recipe(name).changed(_head_changes(head) | wanted)


def _head_changes(head: str | None) -> dict[str, Any]:
    """The recipe keys of `--head`. ConfigError for unknown names."""
    if head is None:
        return {}
    if head == "none":
        return {"head": "none"}
    from mxrot.sections import HeadChoice

    try:
        chosen = HeadChoice.named(head)
    except ConfigError as error:
        raise ConfigError(f"--head {head}: {error}") from error
    return {f"head.{key}": getattr(chosen, key) for key in ("format", "inputs", "transform")}


def recipe_name(recipe: str, purpose: str | None, model: str, family: str | None, head: str | None) -> str:
    """The recipe of `--recipe`, or the one that `--for` selects for the head of `--head`, which is then printed."""
    if purpose is None:
        return recipe
    from mxrot.nearest import not_known

    if purpose != "vllm":
        raise ConfigError(f"--for: {not_known('program', purpose, ['vllm'])}")
    if recipe != DEFAULT_RECIPE:
        raise ConfigError(f"--for vllm: chooses the recipe; leave out --recipe {recipe} or --for")
    from mxrot.deriving import asked_family
    from mxrot.models import find_config
    from mxrot.planning.servable import recipe_for_vllm

    place = find_config(model)
    with asked_family(family, place, model):
        picked = recipe_for_vllm(model, place, _head_changes(head))
    for line in picked.lines:
        say(line)
    return picked.recipe


def with_revision(model: str, revision: str | None) -> str:
    """The hub id with `--revision` appended. ConfigError if the model has no revisions."""
    if revision is None:
        return model
    from mxrot.models.lookup import is_on_hub

    if not is_on_hub(model) or "@" in model or not revision:
        raise ConfigError(f"--revision {revision}: needs a hub id without @, such as owner/name; got {model}")
    return f"{model}@{revision}"


def prepare(model: str, device: str | None, json_file: Path | None, gets_weights: bool = True) -> None:
    """Check what can be checked before hours of work, and make the demo model if it is used for the first time.

    From here on an interrupt is an exception, because there may be something to clean up.
    """
    interrupts.raise_interrupts()
    check_device(device)
    check_file("--json", json_file)
    from mxrot.models.lookup import DEMO, demo_folder, download_note, is_on_hub

    if model == DEMO:
        demo_folder(announce=lambda line: print(line, file=sys.stderr, flush=True))
    elif is_on_hub(model) and gets_weights:
        print(download_note(model), file=sys.stderr, flush=True)


def announce(line: str) -> None:
    """Print a line for the user, apart from the result of the command."""
    print(line, file=sys.stderr, flush=True)


def check_file(option: str, path: Path | None) -> None:
    """ConfigError unless this file can be written. Checked before the work, by one process, which tries it."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{option} {path}: the folder {folder} does not exist")
    try:
        if path.is_dir():
            raise ConfigError(f"{option} {path}: is a folder; name the file to write")
        if path.exists():
            is_writable = os.access(path, os.W_OK)
        else:
            path.touch()  # more certain than access(2): some file systems refuse only the actual write
            path.unlink()
            is_writable = True
    except OSError as error:
        raise ConfigError(f"{option} {brief(str(path), 300)}: cannot be written ({error.strerror})") from error
    if not is_writable:
        raise ConfigError(f"{option} {path}: cannot be written; name another file")


def check_folder(option: str, path: Path | None) -> None:
    """ConfigError if this folder cannot be made."""
    if path is not None and path.exists() and not path.is_dir():
        raise ConfigError(f"{option} {path}: is a file; give a folder")


def spelled(ctx: typer.Context, left_out: Sequence[str]) -> str:
    """The command line with all options that differ from their defaults, except those in `left_out`."""
    from mxrot.shell import command

    words = ["mxrot", str(ctx.info_name)]
    for parameter in ctx.command.params:
        name, value = str(parameter.name), ctx.params.get(str(parameter.name))
        is_option = parameter.param_type_name == "option"
        if name in left_out or value is None or (is_option and value == parameter.default):
            continue
        option = [parameter.opts[-1]] if is_option else []
        each = value if isinstance(value, list | tuple) else [value]
        words += option if value is True else [word for one in each for word in (*option, str(one))]
    return command(*words)


def where(device: str | None) -> str:
    """The device in words: where the command computes."""
    from mxrot.opening import default_device

    return f"on {device or default_device()}"


def chosen_tasks(names: str | None, data: Path | None, limit: int | None) -> dict[str, Any]:
    """The tasks of `--tasks`, loaded before the model. Empty without the option."""
    if names is None:
        for option, value in (("--task-data", data), ("--limit", limit)):
            if value is not None:
                raise ConfigError(f"{option}: needs --tasks; name the tasks")
        return {}
    from mxrot.evaluation import load_tasks

    chosen = [name.strip() for name in names.split(",") if name.strip()]
    return load_tasks(chosen, data, announce=lambda line: print(line, file=sys.stderr, flush=True))


def check_resume(resume: bool, tasks: str | None, json_file: Path | None) -> None:
    """ConfigError if `eval --resume` has nothing to continue from."""
    if resume and (tasks is None or json_file is None):
        raise ConfigError("--resume: needs --tasks and --json FILE; answers to tasks are kept beside that file")


def partial_file(json_file: Path) -> Path:
    """The file that keeps answers until the result is written."""
    return json_file.with_name(json_file.name + ".partial")


def loaded_texts(option: str, specs: list[str]) -> Any:
    """The texts of `--calib` or `--text`, each with its own name, loaded before the model."""
    from mxrot.text import is_fetched, load_text

    for spec in specs:
        if is_fetched(spec):
            print(f"Getting the data set {spec} from the hub, unless it is here already", file=sys.stderr, flush=True)
    texts = [load_text(spec, "calibration" if option == "--calib" else "evaluation") for spec in specs]
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{option}: two texts have the name {name!r}; give them names, as in NAME=FILE")
    return texts


def print_texts(tables: list[dict[str, Any]]) -> None:
    """Print what was read of each text, and what was left out."""
    from mxrot.report import text_lines

    for line in text_lines(tables):
        say(line)


def check_device(device: str | None) -> None:
    """ConfigError unless the device is there and can compute what is needed."""
    if device is not None:
        from mxrot import environment as devices

        devices.check_device(device, "--device")


def console() -> Console:
    """Standard output. Names are printed unchanged; if it is a file, it is wide enough for any table."""
    from rich.console import Console

    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**plain)
    return console if console.is_terminal else Console(width=140, **plain)


def show(table: Table) -> None:
    """Print a table. Its title may hold a path, so it is broken between words only."""
    title, table.title = table.title, None
    if title is not None:
        say(str(title))
    console().print(table)


def write_json(path: Path | None, table: dict[str, Any]) -> None:
    """Write a table as JSON if a file was asked for."""
    if path is not None:
        from mxrot.checkpoint.named_file import write_named

        write_named(path, (json.dumps(table, indent=2) + "\n").encode())


def machine_table(device: str | None) -> dict[str, Any]:
    """The device, kernels and versions that computed a result."""
    import torch

    from mxrot.environment import device_name, versions
    from mxrot.kernels.choices import kernel_choices
    from mxrot.opening import default_device

    used = torch.device(device or default_device())
    return {"device": device_name(used), "kernels": kernel_choices(used), "versions": versions()}
