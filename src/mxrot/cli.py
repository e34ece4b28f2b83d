"""The command line. Thin: it reads options, calls mxrot.api, and prints.

Exit codes: 0 done, 2 bad usage or bad input (one line, no traceback), 1 anything else.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from mxrot.errors import ConfigError, MxrotError


class _Commands(TyperGroup):
    """Turns what mxrot raises on purpose, a full disk and an interrupt into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MxrotError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            kept = "; finished blocks are kept, and --resume goes on from them"
            _fail("interrupted" + (kept if ctx.invoked_subcommand == "quantize" else ""), 1)
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

Model = Annotated[str, typer.Argument(help="Hugging Face id, folder, or `demo`")]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="Recipe name or TOML file")]
TEXT = "demo, a file, NAME=FILE, wikitext2, c4"
Calib = Annotated[str, typer.Option("--calib", metavar="TEXT", help=f"Calibration text: {TEXT}")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Calibration windows at most (recipe's)")]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="Evaluation windows at most (all)")]
Texts = Annotated[list[str], typer.Option("--text", metavar="TEXT", help=f"Evaluation text, repeatable: {TEXT}")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda (the GPU if there is one)")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON")]
CHANGES_HELP = "Change a recipe key, repeatable, e.g. transform.sharing=block"
Changes = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help=CHANGES_HELP)]


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
    from mxrot.report import progress_on_stderr, size_line, tuning_line

    chosen = _recipe(recipe, changes)
    _prepare(model, device, json_file)
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
    console = _console()
    console.print(f"{output}: {len(run['blocks'])} blocks with {chosen.name} in {run['seconds']:.1f} s")
    console.print(size_line(run["size"]))
    if tuned := tuning_line(run):
        console.print(tuned)
    if run["peak_gpu_bytes"] is not None:
        console.print(f"peak GPU memory {run['peak_gpu_bytes'] / 1e9:.2f} GB")
    console.print(f'next: mxrot eval {output}    mxrot generate {output} "Once upon a time"')
    _write_json(json_file, run)


@app.command("eval")
def evaluate(
    model: Model = "demo",
    text: Texts = ["demo"],  # noqa: B006
    windows: Windows = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens a window")] = 2048,
    device: Device = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the SHA-256 of every file first")] = False,
    json_file: Json = None,
) -> None:
    """Perplexity of a model or a checkpoint."""
    from mxrot import api
    from mxrot.records import versions
    from mxrot.report import perplexity_table, progress_on_stderr

    _check_texts(text)
    _prepare(model, device, json_file)
    started = time.monotonic()
    with progress_on_stderr("Evaluating") as told:
        opened, folder = api.open_model(model, device, verify)
        results = api.evaluate(
            opened, text, tokenizer=api.load_tokenizer(folder), windows=windows, seq_len=seq_len, progress=told
        )
    _console().print(perplexity_table(model, results))
    table = {
        "model": model,
        "perplexity": {name: vars(result) for name, result in results.items()},
        "tasks": {},
        "seconds": round(time.monotonic() - started, 2),
        "versions": versions(),
    }
    _write_json(json_file, table)


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
    seed: Seed = 0,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Quantize a model in memory with several recipes, and compare."""
    from mxrot.comparison import compare_recipes
    from mxrot.report import comparison_table, progress_on_stderr

    chosen = [_recipe(name.strip(), changes) for name in recipes.split(",") if name.strip()]
    if not chosen:
        raise ConfigError("--recipes: name at least one")
    _check_texts(text)
    _prepare(model, device, json_file)
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
            progress=told,
        )
    _console().print(comparison_table(rows, f"{model}, windows of {seq_len}"))
    _write_json(json_file, {"rows": [row.as_table() for row in rows]})


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
    from mxrot.report import choices_table, errors_table, maxima_table, progress_on_stderr, size_line, tuning_line

    loaded = load_text(text, "evaluation")
    _prepare(model, device, json_file)
    with progress_on_stderr("Inspecting") as told:
        opened, folder = api.open_model(model, device)
        tokens = token_windows(loaded, api.load_tokenizer(folder), seq_len, windows)
        sites = site_maxima(opened, find_family(opened.config, model), tokens, progress=told)
    console = _console()
    console.print(maxima_table(sites))
    result: dict[str, Any] = {"model": model, "sites": [{**vars(site), "ratio": site.ratio} for site in sites]}
    if is_checkpoint(folder):
        run = json.loads((folder / "run.json").read_text())
        console.print(errors_table(run["blocks"]))
        console.print(size_line(run["size"]))
        if tuned := tuning_line(run):
            console.print(tuned)
        result |= {"blocks": run["blocks"], "size": run["size"]}
    if kernels:
        choices = kernel_choices(opened)
        console.print(choices_table(choices))
        result["kernels"] = [vars(choice) for choice in choices]
    _write_json(json_file, result)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens at most")] = 60,
    device: Device = None,
) -> None:
    """Continue a prompt, greedily."""
    from mxrot import api

    _prepare(model, device, None)
    opened, folder = api.open_model(model, device)
    continuation = api.generate_text(opened, api.load_tokenizer(folder), prompt, max_tokens)
    print(prompt + continuation)


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
    _console().print(table)


@app.command()
def demo(seed: Seed = 0, device: Device = None, json_file: Json = None) -> None:
    """Quantize the demo model with rtn and duquant++, and compare."""
    from mxrot.comparison import compare_recipes
    from mxrot.recipe import load_recipe
    from mxrot.report import comparison_table, progress_on_stderr

    _prepare("demo", device, json_file)
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
    console = _console()
    console.print(comparison_table(rows, "SmolLM2-135M-Instruct, weights and activations in MXFP4; held-out demo text"))
    for row in rows:
        print(f"{row.recipe}: {row.extra['generated']}")
    _write_json(json_file, {"rows": [row.as_table() for row in rows]})


benchmarks = typer.Typer(no_args_is_help=True, help="Speed, beside what it replaces.", rich_markup_mode=None)
app.add_typer(benchmarks, name="bench")


@benchmarks.command("kernels")
def bench_kernels_command(
    rows: Annotated[list[int], typer.Option("--rows", min=1, help="Rows of the input, repeatable")] = [],  # noqa: B006
    shapes: Annotated[
        list[str], typer.Option("--shape", metavar="NxK", help="A weight, repeatable (Llama-3-8B's)")
    ] = [],  # noqa: B006
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Kernels beside the bfloat16 product; one that fails its check has no speed."""
    import torch

    from mxrot import api, bench
    from mxrot.records import device_name, versions

    _check_device(device)
    where = torch.device(device or api.default_device())
    sizes = [_shape(text) for text in shapes] or bench.LLAMA_3_8B
    limits = bench.ceilings(where)
    found = bench.bench_kernels(where, sizes, rows or bench.ROWS, lambda line: print(line, file=sys.stderr, flush=True))
    _console().print(bench.kernel_table(found, limits))
    for (kernel, count), ratio in bench.geometric_means(found).items():
        print(f"{kernel}, {count} rows: {ratio:.2f} times as fast, geometric mean over the shapes")
    table = {
        "device": device_name(where),
        "versions": versions(),
        "ceilings": limits,
        "rows": [row.as_record() for row in found],
    }
    _write_json(json_file, table)
    if not all(row.holds for row in found):
        raise typer.Exit(1)


@benchmarks.command("model")
def bench_model_command(
    recipe: RecipeOption = "mxrot",
    changes: Changes = [],  # noqa: B006
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Decoder blocks (Llama-3-8B's)")] = 32,
    hidden: Annotated[int, typer.Option("--hidden", min=32, help="Hidden size")] = 4096,
    ffn: Annotated[int, typer.Option("--ffn", min=32, help="Size between the linears of the MLP")] = 14336,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Attention heads")] = 32,
    kv_heads: Annotated[int, typer.Option("--kv-heads", min=1, help="Heads of keys and values")] = 8,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=1, help="Tokens there are")] = 128256,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the prompt")] = 8192,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens before the one generated")] = 1024,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """A model of random weights: a prompt and a generated token, quantized and in bfloat16."""
    import torch
    from transformers import LlamaConfig

    from mxrot import api, bench
    from mxrot.records import device_name, versions

    _check_device(device)
    where = torch.device(device or api.default_device())
    chosen = _recipe(recipe, changes)
    if hidden % (32 * heads) or hidden % 32 or ffn % 32 or heads % kv_heads:
        raise ConfigError("--hidden must be a multiple of 32 times --heads, --ffn of 32, --heads of --kv-heads")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(prompt, context + 1),
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    rows = bench.bench_model(
        config, chosen, where, prompt, context, lambda line: print(line, file=sys.stderr, flush=True)
    )
    _console().print(bench.model_table(rows))
    table = {"device": device_name(where), "versions": versions(), "rows": [row.as_record() for row in rows]}
    _write_json(json_file, table | {"config": config.to_diff_dict(), "recipe_toml": chosen.to_toml()})
    if any(row.seconds is None for row in rows):
        raise typer.Exit(1)


def _shape(text: str) -> tuple[int, int]:
    """(N, K) of NxK."""
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise ConfigError(f"--shape {text}: not of the form NxK, such as 4096x4096") from None
    if height < 1 or width < 32 or width % 32:
        raise ConfigError(f"--shape {text}: N must be positive and K a multiple of 32")
    return height, width


def _recipe(name: str, changes: list[str]) -> Any:
    from mxrot.recipe import load_recipe

    return load_recipe(name).changed(dict(_change(text) for text in changes))


def _change(text: str) -> tuple[str, Any]:
    """A `--set KEY=VALUE`, the value read as TOML where it is that, else as a string."""
    from mxrot.recipe import tomllib

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: expected KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _prepare(model: str, device: str | None, json_file: Path | None) -> None:
    """What can be found wrong at once, before hours of work; and the demo model, which is made at its first use."""
    _check_device(device)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: there is no folder {json_file.parent}")
    from mxrot.models.lookup import DEMO, demo_folder

    if model == DEMO:
        demo_folder(announce=lambda line: print(line, file=sys.stderr, flush=True))
    elif "/" in model and not Path(model).expanduser().exists() and not model.startswith((".", "/", "~")):
        print(f"Getting {model} from the hub, unless it is here already", file=sys.stderr, flush=True)


def _check_texts(texts: list[str]) -> None:
    """Each is there and has a name of its own; found out before a model is loaded."""
    from mxrot.calibration import load_text

    names = [load_text(text, "evaluation").name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--text: two texts are called {name!r}; name them, as in NAME=FILE")


def _check_device(device: str | None) -> None:
    import torch

    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: not usable here: {str(error).splitlines()[0]}") from error


def _console() -> Console:
    """Standard output; wide enough for a table where it goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _write_json(path: Path | None, table: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


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
