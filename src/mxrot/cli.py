"""The command line. Thin: it reads options, calls mxrot.api, and prints.

Exit codes: 0 done, 2 bad usage or bad input (one line, no traceback), 1 anything else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mxrot.cli_bench import benchmarks
from mxrot.cli_options import (
    Calib,
    Changes,
    Device,
    Json,
    Limit,
    Model,
    RecipeOption,
    Samples,
    Seed,
    TaskData,
    Tasks,
    Texts,
    Windows,
    check_resume,
    check_texts,
    chosen_recipe,
    chosen_tasks,
    console,
    partial_file,
    prepare,
    write_json,
)
from mxrot.cli_report import report
from mxrot.errors import ConfigError, MxrotError

_KEPT = "mxrot.kept"
"""Where a command says what an interrupt leaves behind."""


class _Commands(TyperGroup):
    """Turns what mxrot raises on purpose, a full disk and an interrupt into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MxrotError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            kept = "finished blocks" if ctx.invoked_subcommand == "quantize" else ctx.meta.get(_KEPT)
            _fail("interrupted" + (f"; {kept} are kept, and --resume goes on from them" if kept else ""), 1)
        except BrokenPipeError:  # the reader of standard output went away, as in `mxrot recipes | head`
            raise
        except OSError as error:
            _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1)


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LLMs in MXFP4, with the block rotations that make it accurate.",
)
app.add_typer(benchmarks, name="bench")
app.command()(report)


@app.command()
def quantize(
    model: Model = "demo",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write")] = Path("mxrot-output"),
    recipe: RecipeOption = "mxrot",
    changes: Changes = [],  # noqa: B006 (typer copies it)
    calib: Calib = "demo",
    samples: Samples = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens a window (recipe's)")] = None,
    seed: Seed = 0,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output folder that is not empty")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished blocks, and go on where a run ended")] = False,
    json_file: Json = None,
) -> None:
    """Quantize a model into a checkpoint folder."""
    from mxrot import api
    from mxrot.report import experts_line, progress_on_stderr, size_line, tuning_line

    chosen = chosen_recipe(recipe, changes)
    prepare(model, device, json_file)
    with progress_on_stderr(f"Quantizing with {chosen.name}") as told:
        run = api.quantize(
            model,
            chosen,
            output,
            calib=calib,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            force=force,
            resume=resume,
            progress=told,
        )
    assert isinstance(run, dict)
    out = console()
    out.print(f"{output}: {len(run['blocks'])} blocks with {chosen.name} in {run['seconds']:.1f} s")
    out.print(size_line(run["size"]))
    for line in filter(None, (tuning_line(run), experts_line(run))):
        out.print(line)
    if run["peak_gpu_bytes"] is not None:
        out.print(f"peak GPU memory {run['peak_gpu_bytes'] / 1e9:.2f} GB")
    out.print(f'next: mxrot eval {output}    mxrot generate {output} "Once upon a time"')
    write_json(json_file, run)


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    model: Model = "demo",
    text: Texts = [],  # noqa: B006
    windows: Windows = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens a window")] = 2048,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The original: how far from it, token by token")
    ] = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Requests at once (by device)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --tasks where a run with --json ended")] = False,
    device: Device = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the SHA-256 of every file first")] = False,
    json_file: Json = None,
) -> None:
    """Perplexity of a model or a checkpoint, and its scores in tasks.

    Text is `demo` where neither texts nor tasks are named.
    """
    from mxrot import api
    from mxrot.evaluation import score_tasks
    from mxrot.records import versions
    from mxrot.report import divergence_table, perplexity_table, progress_on_stderr, tasks_table

    texts = text or ([] if tasks and against is None else ["demo"])
    check_texts(texts)
    check_resume(resume, tasks, json_file)
    prepare(model, device, json_file)
    if against is not None:
        prepare(against, device, None)
    loaded = chosen_tasks(tasks, task_data, limit)
    started = time.monotonic()
    apart = None
    scores = {}
    with progress_on_stderr("Evaluating") as told, contextlib.ExitStack() as stack:
        opened, folder = api.open_model(model, device, verify)
        tokenizer = api.load_tokenizer(folder)
        answers = None
        if loaded and json_file is not None:
            answers = stack.enter_context(api.kept_answers(partial_file(json_file), opened, folder, resume))
            ctx.meta[_KEPT] = "answers to tasks"
        if against is not None:
            options: dict[str, Any] = {"windows": windows, "seq_len": seq_len, "device": device, "progress": told}
            apart = api.diverge(opened, against, texts, tokenizer=tokenizer, **options)
            results = {name: found.perplexity for name, found in apart.items()}
        else:
            results = api.evaluate(opened, texts, tokenizer=tokenizer, windows=windows, seq_len=seq_len, progress=told)
        if loaded:
            options = {"limit": limit, "batch_size": batch_size, "answers": answers, "progress": told}
            scores = score_tasks(opened, tokenizer, loaded, **options)
    if results:
        console().print(perplexity_table(model, results))
    if apart is not None:
        console().print(divergence_table(model, str(against), apart))
    if scores:
        console().print(tasks_table(model, scores))
    table = {
        "model": model,
        "perplexity": {name: vars(result) for name, result in results.items()},
        "against": against,
        "divergence": None if apart is None else {name: vars(result) for name, result in apart.items()},
        "tasks": {name: score.as_table() for name, score in scores.items()},
        "seconds": round(time.monotonic() - started, 2),
        "versions": versions(tasks=bool(scores)),
    }
    write_json(json_file, table)
    if answers is not None:
        answers.remove()


@app.command()
def compare(
    model: Model = "demo",
    recipes: Annotated[str, typer.Option("--recipes", help="Names or files, comma-separated")] = "rtn,duquant++",
    changes: Changes = [],  # noqa: B006
    calib: Calib = "demo",
    samples: Samples = None,
    text: Texts = ["demo"],  # noqa: B006
    windows: Windows = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens a window, for both")] = 2048,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Quantize a model in memory with several recipes, and compare."""
    from mxrot.comparison import compare_recipes
    from mxrot.report import compared_tasks_table, comparison_table, progress_on_stderr

    chosen = [chosen_recipe(name.strip(), changes) for name in recipes.split(",") if name.strip()]
    if not chosen:
        raise ConfigError("--recipes: name at least one")
    check_texts(text)
    prepare(model, device, json_file)
    loaded = chosen_tasks(tasks, task_data, limit)
    with progress_on_stderr("Comparing") as told:
        rows = compare_recipes(
            model,
            chosen,
            calib=calib,
            samples=samples,
            texts=text,
            windows=windows,
            seq_len=seq_len,
            seed=seed,
            device=device,
            tasks=loaded,
            limit=limit,
            progress=told,
        )
    console().print(comparison_table(rows, f"{model}, windows of {seq_len}"))
    if loaded:
        console().print(compared_tasks_table(rows))
    write_json(json_file, {"rows": [row.as_table() for row in rows]})


@app.command()
def inspect(
    model: Model = "demo",
    text: Annotated[str, typer.Option("--text", metavar="TEXT", help="Text to look at the activations on")] = "demo",
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of it")] = 4,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens a window")] = 512,
    kernels: Annotated[bool, typer.Option("--kernels", help="Also which kernel computes each linear, and why")] = False,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Outliers in the inputs of each site; errors of a checkpoint."""
    from mxrot import api
    from mxrot.calibration import load_text, token_windows
    from mxrot.checkpoint import is_checkpoint
    from mxrot.evaluation import kernel_choices, site_maxima
    from mxrot.models import find_family
    from mxrot.report import (
        choices_table,
        errors_table,
        experts_line,
        maxima_table,
        progress_on_stderr,
        size_line,
        tuning_line,
    )

    loaded = load_text(text, "evaluation")
    prepare(model, device, json_file)
    with progress_on_stderr("Inspecting") as told:
        opened, folder = api.open_model(model, device)
        tokens = token_windows(loaded, api.load_tokenizer(folder), seq_len, windows)
        sites = site_maxima(opened, find_family(opened.config, model), tokens, progress=told)
    out = console()
    out.print(maxima_table(sites))
    result: dict[str, Any] = {"model": model, "sites": [{**vars(site), "ratio": site.ratio} for site in sites]}
    if is_checkpoint(folder):
        run = json.loads((folder / "run.json").read_text())
        out.print(errors_table(run["blocks"]))
        out.print(size_line(run["size"]))
        for line in filter(None, (tuning_line(run), experts_line(run))):
            out.print(line)
        result |= {"blocks": run["blocks"], "size": run["size"]}
    if kernels:
        choices = kernel_choices(opened)
        out.print(choices_table(choices))
        result["kernels"] = [vars(choice) for choice in choices]
    write_json(json_file, result)


@app.command()
def plan(
    model: Model = "demo",
    recipe: RecipeOption = "mxrot",
    changes: Changes = [],  # noqa: B006
    samples: Samples = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens a window (recipe's)")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", min=0.1, metavar="GB", help="Plan for a GPU with so much free")
    ] = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """What quantizing would take, from a config.json alone.

    Exits with 1 if it would be refused.
    """
    import torch

    from mxrot import api
    from mxrot.models import find_config
    from mxrot.planning import Machine, make_plan
    from mxrot.report import plan_report

    chosen = chosen_recipe(recipe, changes)
    prepare(model, device, json_file)
    machine = Machine(torch.device(device or api.default_device()), gpu_memory and 1e9 * gpu_memory)
    made = make_plan(model, find_config(model), chosen, machine, samples, seq_len)
    out = console()
    for piece in plan_report(made):
        out.print(piece, markup=False, highlight=False, soft_wrap=isinstance(piece, str))
    write_json(json_file, made.as_table())
    if made.problems:
        raise typer.Exit(1)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens at most")] = 60,
    device: Device = None,
) -> None:
    """Continue a prompt, greedily."""
    from mxrot import api

    prepare(model, device, None)
    opened, folder = api.open_model(model, device)
    continuation = api.generate_text(opened, api.load_tokenizer(folder), prompt, max_tokens)
    print(prompt + continuation)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder that `mxrot quantize` has written")],
    to: Annotated[str, typer.Option("--to", metavar="PROGRAM", help="Program to run it with: vllm")] = "vllm",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; without it the checkpoint is only checked")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output folder that is not empty")] = False,
    json_file: Json = None,
) -> None:
    """Say what vLLM does with a checkpoint; write it for vLLM."""
    from mxrot.checkpoint import check_for_vllm, export_for_vllm
    from mxrot.models import find_model
    from mxrot.report import print_vllm_report

    if to != "vllm":
        raise ConfigError(f"--to {to}: not known; known is vllm")
    prepare(model, None, json_file)
    folder = find_model(model)
    report = check_for_vllm(folder) if output is None else export_for_vllm(folder, output.expanduser(), force)
    out = console()
    print_vllm_report(report, out)
    if output is not None:
        out.print(f"{output}: written; next: vllm serve {output}")
    write_json(json_file, report.as_table() | {"output": None if output is None else str(output)})


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe as TOML")] = None) -> None:
    """List the built-in recipes, or print one."""
    from mxrot.recipe import builtin_recipes, load_recipe

    if name is not None:
        print(load_recipe(name).to_toml(), end="")
        return
    from rich.table import Table

    table = Table("recipe", "what it does", "source", title="Recipes", title_justify="left")
    for known in sorted(builtin_recipes()):
        recipe = load_recipe(known)
        table.add_row(recipe.name, recipe.summary, recipe.source)
    console().print(table)


@app.command()
def demo(seed: Seed = 0, device: Device = None, json_file: Json = None) -> None:
    """Quantize the demo model with rtn and duquant++, and compare."""
    from mxrot.comparison import compare_recipes
    from mxrot.recipe import load_recipe
    from mxrot.report import comparison_table, progress_on_stderr

    prepare("demo", device, json_file)
    with progress_on_stderr("Demo") as told:
        rows = compare_recipes(
            "demo",
            [load_recipe("rtn"), load_recipe("duquant++")],
            samples=8,
            windows=16,
            seq_len=512,
            seed=seed,
            device=device,
            prompt="The three primary colors are",
            progress=told,
        )
    out = console()
    out.print(comparison_table(rows, "SmolLM2-135M-Instruct, weights and activations in MXFP4; held-out demo text"))
    for row in rows:
        print(f"{row.recipe}: {row.extra['generated']}")
    write_json(json_file, {"rows": [row.as_table() for row in rows]})


def main() -> None:
    """Entry point of the command `mxrot`."""
    # Threads that spin while they wait for one another stand still where cores are shared: 25 times as slow beside
    # one other process. Read when torch is loaded, so no module that this one imports may load it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Other packages speak to developers: torchao, where it is installed, warns of extensions it does not need.
    logging.disable(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    app()


def _fail(message: str, code: int) -> NoReturn:
    print(f"mxrot: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
