"""The command `mxrot quantize`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from mxrot.commands.lasting import Metrics, TensorBoard, TimeLimitOption, chosen_limit, chosen_watch
from mxrot.commands.lines import say
from mxrot.commands.options import (
    DEFAULT_RECIPE,
    Calib,
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
    Seed,
    chosen_recipe,
    loaded_texts,
    prepare,
    print_texts,
    recipe_name,
    where,
    with_revision,
    write_json,
)
from mxrot.commands.processes import looks, own_device, told
from mxrot.errors import ConfigError
from mxrot.shell import command, is_utf8


def quantize(
    model: Model = "demo",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write")] = Path("mxrot-output"),
    recipe: RecipeOption = DEFAULT_RECIPE,
    purpose: Purpose = None,
    head: Head = None,
    changes: Changes = [],  # noqa: B006 (typer copies it)
    calib: Calib = ["demo"],  # noqa: B006
    samples: Samples = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, help="Tokens in a window (default: the recipe's)")
    ] = None,
    seed: Seed = 0,
    family: FamilyOption = None,
    revision: Revision = None,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output folder that is not empty")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished blocks, and continue where a run ended")
    ] = False,
    json_file: Json = None,
    time_limit: TimeLimitOption = None,
    metrics: Metrics = None,
    tensorboard: TensorBoard = None,
) -> None:
    """Quantize a model into a checkpoint folder."""
    limit = chosen_limit(time_limit)  # first, because importing takes time as well
    from mxrot import api
    from mxrot.deriving import check_asked
    from mxrot.progress.display import HEARTBEAT_SECONDS
    from mxrot.ranks import joined

    model = with_revision(model, revision)
    check_asked(family)
    chosen = chosen_recipe(recipe_name(recipe, purpose, model, family, head), changes, head)
    if not is_utf8(output):
        raise ConfigError(
            f"--output {output}: the name is not UTF-8, which no reader of tokenizers accepts; give another one"
        )
    if json_file is not None and json_file.absolute() == output.absolute():
        raise ConfigError(f"--json {json_file}: is also the output folder; name another file")
    with joined(device) as world:
        with looks(world):
            texts = None if chosen.is_data_free else loaded_texts("--calib", calib)
            writes = not world.rank
            watch = chosen_watch(limit, metrics if writes else None, tensorboard if writes else None, output, resume)
            prepare(model, device, json_file if writes else None)
        device = own_device(world, device)
        task = f"{model}, {where(device)}, {_calibration(chosen, samples, seq_len)}, into {output}"
        title = f"Quantizing with {chosen.name}"
        with told(world, title, task, HEARTBEAT_SECONDS) as progress, closing(watch):
            run = api.quantize(
                model,
                chosen,
                output,
                calib=texts,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
                device=device,
                force=force,
                resume=resume,
                family=family,
                progress=progress,
                watch=watch,
            )
    if not world.rank:
        _tell(run, chosen.name, output)
        write_json(json_file, run)


def _tell(run: dict[str, Any], recipe: str, output: Path) -> None:
    """Print a summary of the result on standard output."""
    from mxrot.report import (
        choice_line,
        experts_line,
        family_line,
        head_line,
        left_line,
        passed_line,
        rank_line,
        recipe_line,
        rotation_line,
        sites_choice_line,
        size_line,
        tuning_line,
    )

    say(f"{output}: {len(run['blocks'])} blocks with {recipe} in {run['seconds']:.1f} s")
    say(size_line(run["size"]))
    lines = (
        *(family_line, head_line, passed_line, left_line, recipe_line, rank_line, rotation_line),
        *(choice_line, sites_choice_line, tuning_line, experts_line),
    )
    for line in filter(None, (line_of(run) for line_of in lines)):
        say(line)
    print_texts((run["data"] or {}).get("texts", []))
    if run["peak_gpu_bytes"] is not None:
        say(f"peak GPU memory {run['peak_gpu_bytes'] / 1e9:.2f} GB")
    print(f"next: {command('mxrot', 'eval', output)}")
    print(f"  or: {command('mxrot', 'generate', output, 'Once upon a time')}")


def _calibration(recipe: Any, samples: int | None, seq_len: int | None) -> str:
    """The amount of calibration text, in words."""
    if recipe.is_data_free:
        return "without text"
    windows = samples or recipe.calibration.samples
    return f"calibrated on up to {windows} windows of {seq_len or recipe.calibration.seq_len} tokens"
