"""The command `mxrot plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxrot.commands.lines import say
from mxrot.commands.options import (
    DEFAULT_RECIPE,
    Changes,
    Device,
    FamilyOption,
    Head,
    Json,
    Model,
    Purpose,
    RecipeOption,
    Revision,
    Samples,
    chosen_recipe,
    console,
    prepare,
    recipe_name,
    show,
    with_revision,
    write_json,
)
from mxrot.errors import ConfigError

MOST_MEMORY = 1_000_000
"""In GB. No GPU has more."""


def plan(
    model: Model = "demo",
    recipe: RecipeOption = DEFAULT_RECIPE,
    purpose: Purpose = None,
    head: Head = None,
    changes: Changes = [],  # noqa: B006
    samples: Samples = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, help="Tokens in a window (default: the recipe's)")
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", min=0.1, metavar="GB", help="Plan for a GPU with this much free memory"),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", min=1, metavar="N", help="Plan for N processes that share the work, with one GPU each"
        ),
    ] = 1,
    rates: Annotated[
        Path | None,
        typer.Option("--rates", metavar="FILE", help="Plan the time on the machine where plan --json wrote FILE"),
    ] = None,
    family: FamilyOption = None,
    revision: Revision = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Say what quantizing would need, from config.json alone.

    Exits with 1 if the model would be refused.
    """
    import torch

    from mxrot import api
    from mxrot.deriving import asked_family, check_asked
    from mxrot.models import find_config
    from mxrot.planning import Machine, OtherRates, make_plan
    from mxrot.planning.fits import verdict
    from mxrot.report import plan_report

    if gpu_memory is not None and gpu_memory > MOST_MEMORY:
        raise ConfigError(f"--gpu-memory {gpu_memory}: is in GB, at most {MOST_MEMORY}")
    check_asked(family)
    chosen_recipe(recipe, changes, head)  # errors of the recipe are found first
    model = with_revision(model, revision)
    prepare(model, device, json_file, gets_weights=False)
    chosen = chosen_recipe(recipe_name(recipe, purpose, model, family, head), changes, head)
    other = None if rates is None else OtherRates.read(rates)
    machine = Machine(torch.device(device or api.default_device()), gpu_memory and 1e9 * gpu_memory, other)
    place = find_config(model)
    with asked_family(family, place, model):
        made = make_plan(model, place, chosen, machine, samples, seq_len, processes)
    for piece in plan_report(made, console().width):
        if isinstance(piece, str):
            say(piece)
        else:
            show(piece)
    line = verdict(made, machine)
    say(line)
    write_json(json_file, made.as_table() | {"verdict": line.removeprefix("verdict: ")})
    if made.problems:
        raise typer.Exit(1)
