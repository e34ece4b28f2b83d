"""The command `mxrot search`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mxrot.commands.options import (
    KEPT,
    Calib,
    Changes,
    Device,
    Json,
    Model,
    RecipeOption,
    Revision,
    Samples,
    Seed,
    Texts,
    announce,
    check_file,
    chosen_recipe,
    loaded_texts,
    machine_table,
    prepare,
    print_texts,
    show,
    where,
    with_revision,
    write_json,
)
from mxrot.commands.processes import looks, own_device, told
from mxrot.errors import ConfigError
from mxrot.shell import command

if TYPE_CHECKING:  # imports torch, which takes longer than a command that is refused
    from mxrot.search.bits import Limits

MOST_BITS = 64


def search(
    ctx: typer.Context,
    model: Model = "demo",
    bits: Annotated[float, typer.Option("--bits", help="Limit of the mean bits per weight, scales included")] = 4.5,
    input_bits: Annotated[
        float | None,
        typer.Option("--input-bits", metavar="BITS", help="Limit of the mean bits per input (default: none)"),
    ] = None,
    choices: Annotated[
        str, typer.Option("--choices", metavar="FORMATS", help="Comma-separated; WEIGHTS/INPUTS names them separately")
    ] = "mxfp4,mxfp6_e2m3,mxfp8_e4m3",
    inputs_only: Annotated[
        bool, typer.Option("--inputs-only", help="Raise inputs only; --bits is then the limit of inputs")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Recipe to write, a TOML file")] = Path(
        "mixture.toml"
    ),
    recipe: RecipeOption = "mxrot",
    changes: Changes = [],  # noqa: B006
    calib: Calib = ["demo"],  # noqa: B006
    samples: Samples = None,
    text: Texts = ["demo"],  # noqa: B006
    windows: Annotated[
        int, typer.Option("--windows", min=1, help="Windows of each text to search on; as many others judge")
    ] = 8,
    seq_len: Annotated[
        int, typer.Option("--seq-len", min=2, help="Tokens in a window, to calibrate and to evaluate")
    ] = 2048,
    seed: Seed = 0,
    work: Annotated[
        Path | None,
        typer.Option("--work", metavar="DIR", help="Folder for unfinished work (default: one in the cache)"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an earlier search")] = False,
    revision: Revision = None,
    device: Device = None,
    json_file: Json = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw KL against bits into this file, .png or .svg")
    ] = None,
) -> None:
    """Find sites worth more bits, and write them as a recipe.

    With torchrun several processes share the work.
    """
    from mxrot.checkpoint.named_file import write_named
    from mxrot.models import find_model
    from mxrot.ranks import joined
    from mxrot.report.trade_off import check_plot
    from mxrot.report.work_folder import default_work_folder
    from mxrot.search import parse_choices
    from mxrot.search import search as find
    from mxrot.search.picture import picture_file
    from mxrot.search.table import found_lines, found_tables

    started = time.monotonic()
    with joined(device) as world:
        with looks(world):
            chosen = chosen_recipe(recipe, changes)
            limits = _limits(bits, input_bits, inputs_only)
            named = parse_choices(choices, chosen, inputs_only)
            if not world.rank:
                _check_places(output, plot)
            check_plot(plot)
            texts = loaded_texts("--text", text)
            calibration = None if chosen.is_data_free else loaded_texts("--calib", calib)
            model = with_revision(model, revision)
            prepare(model, device, None if world.rank else json_file)
        device = own_device(world, device)
        spelled = ", ".join(choice.spelled for choice in named)
        task = f"{model}, {where(device)}, {chosen.name} raised to {spelled}"
        with told(world, "Searching", task) as progress:
            ctx.meta[KEPT] = "finished blocks and measurements"
            found = find(
                model,
                chosen,
                named,
                limits,
                calib=calibration,
                samples=samples,
                texts=texts,
                windows=windows,
                seq_len=seq_len,
                seed=seed,
                device=device,
                work=default_work_folder(find_model(model), "search") if work is None else work,
                resume=resume,
                announce=(lambda line: None) if world.rank else announce,
                progress=progress,
            )
    if world.rank:
        return
    most = f"{bits:g} bits {'an input' if inputs_only else 'a weight'}"
    title = f"{model}, {chosen.name} raised to at most {most}"
    for table in found_tables(found, title):
        show(table)
    for line in found_lines(found):
        print(line)
    print_texts([one.as_table() for one in found.texts])
    write_named(output, found.recipe_text.encode())
    given = ["--seed", str(seed)] if seed else []
    given += [] if calibration is None else [word for spec in calib if spec != "demo" for word in ("--calib", spec)]
    print(f"next: {command('mxrot', 'quantize', model, '--recipe', output, *given, '-o', output.with_suffix(''))}")
    seconds = round(time.monotonic() - started, 2)
    about = {"seed": seed, "processes": world.size, "seconds": seconds, **machine_table(device)}
    write_json(json_file, {**found.as_table(), **about})
    if plot is not None:
        write_named(plot, picture_file(found, title, plot.suffix.lower().lstrip(".")))


def _limits(bits: float, input_bits: float | None, inputs_only: bool) -> Limits:
    """The limits of the mixture."""
    from mxrot.search.bits import Limits

    if inputs_only and input_bits is not None:
        raise ConfigError("--input-bits: with --inputs-only, --bits is the limit of inputs")
    for option, value in (("--bits", bits), ("--input-bits", input_bits)):
        if value is not None and not 0 < value <= MOST_BITS:
            raise ConfigError(f"{option} {value:g}: expected bits, such as 4.5")
    return Limits(None, bits) if inputs_only else Limits(bits, input_bits)


def _check_places(output: Path, plot: Path | None) -> None:
    """ConfigError if a file cannot be written."""
    if output.suffix != ".toml":
        raise ConfigError(f"--output {output}: the recipe is a TOML file; give a name that ends in .toml")
    for option, path in (("--output", output), ("--plot", plot)):
        check_file(option, path)
