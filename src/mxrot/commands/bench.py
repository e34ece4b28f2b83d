"""The commands `mxrot bench ...`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from mxrot.commands.cache_options import KvFirst, KvLast
from mxrot.commands.options import (
    Calib,
    Changes,
    Device,
    Json,
    Model,
    RecipeOption,
    Recipes,
    Samples,
    check_device,
    chosen_recipe,
    loaded_texts,
    prepare,
    show,
    write_json,
)
from mxrot.errors import ConfigError
from mxrot.nearest import brief

MOST_WEIGHTS = 1 << 33
"""The most weights of a linear that is timed. This is 16 GiB in bfloat16."""

benchmarks = typer.Typer(no_args_is_help=True, help="Measure speed, beside what mxrot replaces.", rich_markup_mode=None)


@benchmarks.command("kernels")
def bench_kernels_command(
    rows: Annotated[list[int], typer.Option("--rows", min=1, help="Rows of the input, repeatable")] = [],  # noqa: B006
    shapes: Annotated[
        list[str], typer.Option("--shape", metavar="NxK", help="Shape of a weight, repeatable (default: Llama-3-8B's)")
    ] = [],  # noqa: B006
    remember: Annotated[
        bool, typer.Option("--remember", help="Store the results; models here choose kernels by them")
    ] = (False),
    tiles: Annotated[
        bool, typer.Option("--tiles", help="Products only, that of middle rows by every tile; prints the fastest")
    ] = False,
    lut: Annotated[bool, typer.Option("--lut", help="Measure only 2-bit weights that are looked up")] = False,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Measure kernels beside the bfloat16 product.

    A kernel that fails its check gets no speed.
    """
    import torch

    from mxrot import api, bench
    from mxrot.environment import device_name, versions
    from mxrot.kernels import crossovers

    check_device(device)
    where = torch.device(device or api.default_device())
    if remember and where.type != "cuda":
        raise ConfigError(f"--remember: on {where.type} there is only one kernel; leave it out")
    if remember and lut:
        raise ConfigError("--remember: --lut measures nothing that models choose by; leave out one of the two")
    if tiles and lut:
        raise ConfigError("--tiles: --lut has no tiles to choose from; leave out one of the two")
    sizes = [_shape(text, 128 if lut else 32) for text in shapes] or bench.LLAMA_3_8B
    limits = bench.ceilings(where)
    tell = partial(print, file=sys.stderr, flush=True)
    if lut:
        found = bench.bench_look_up(where, sizes, rows or bench.LOOK_UP_COUNTS, tell)
    else:
        found = bench.bench_kernels(where, sizes, rows or bench.ROWS, tell, tiles)
    show(bench.kernel_table(found, limits))
    absent = {} if lut else bench.absent_others(where)
    if absent:
        print("; ".join(f"{name} is not measured: {reason}" for name, reason in absent.items()))
    for (kernel, count), ratio in bench.geometric_means(found).items():
        print(f"{kernel}, {count} rows: {ratio:.2f} times as fast, geometric mean over the shapes")
    fastest = bench.best_tiles(found)
    for alone, of_shapes in ((False, fastest), (True, bench.best_tiles(found, alone=True))):
        for shape, (tile, seconds) in of_shapes.items():
            kind = "without the quantizer" if alone else "with the quantizer"
            print(f"middle rows, {' '.join(map(str, shape))}: {tile}: {1e6 * seconds:.1f} us {kind}")
    limit = bench.measured_crossovers(found)
    if limit is not None:
        print(f"from packed codes: up to {limit.packed} rows, up to {limit.kept} where weights are kept in FP8")
        if limit.middle:
            most = f"{limit.middle} rows, up to {limit.middle_kept} where weights are kept in FP8"
            print(f"by the product for middle rows: from {limit.few + 1} to {most}")
    if remember and limit is not None:
        print(f"remembered: {crossovers.remember(where, limit)}")
    table = {
        "device": device_name(where),
        "versions": versions(),
        "ceilings": limits,
        "crossovers": None if limit is None else vars(limit),
        "absent": absent,
        "fastest_tiles": [{"shape": shape, "tile": tile} for shape, (tile, _) in fastest.items()],
        "rows": [row.as_record() for row in found],
    }
    write_json(json_file, table)
    if not all(row.holds for row in found):
        raise typer.Exit(1)


@benchmarks.command("model")
def bench_model_command(
    recipe: RecipeOption = "mxrot",
    changes: Changes = [],  # noqa: B006
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Decoder blocks (the defaults are Llama-3-8B's)")] = 32,
    hidden: Annotated[int, typer.Option("--hidden", min=32, help="Hidden size")] = 4096,
    ffn: Annotated[int, typer.Option("--ffn", min=32, help="Inner size of the MLP")] = 14336,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Attention heads")] = 32,
    kv_heads: Annotated[int, typer.Option("--kv-heads", min=1, help="Heads of keys and values")] = 8,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=1, help="Tokens in the vocabulary")] = 128256,
    prompt: Annotated[int, typer.Option("--prompt", min=0, help="Tokens of the prompt; 0 for none")] = 8192,
    contexts: Annotated[str, typer.Option("--context", help="Tokens before the generated one, comma-separated")] = (
        "1024"
    ),
    batches: Annotated[
        str, typer.Option("--batch", help="Sequences that generate a token at once, comma-separated")
    ] = "1",
    cache: Annotated[
        str | None,
        typer.Option(
            "--kv", metavar="FORMAT", help="Also generate with keys and values in this format: mxfp4, int4 or another"
        ),
    ] = None,
    cache_transform: Annotated[
        str,
        typer.Option(
            "--kv-transform", metavar="KIND", help="Transform of keys and values: hadamard, second-moment or none"
        ),
    ] = "hadamard",
    cache_first: KvFirst = 0,
    cache_last: KvLast = 0,
    compiles: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile the decoder blocks (default: without --kv)"),
    ] = None,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Also show where the time of a token goes, without torch.compile")
    ] = False,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Measure a model of random weights beside bfloat16.

    It reads a prompt, and generates one token of each sequence.
    """
    import torch

    from mxrot import api, bench
    from mxrot.environment import device_name, versions

    check_device(device)
    where = torch.device(device or api.default_device())
    chosen = chosen_recipe(recipe, changes)
    if hidden % (32 * heads) or hidden % 32 or ffn % 32 or heads % kv_heads:
        raise ConfigError("--hidden must be a multiple of 32 times --heads, --ffn of 32, --heads of --kv-heads")
    if compiles and cache is not None:
        raise ConfigError("--compile: with --kv both caches run without torch.compile; leave out one of the two")
    if cache is None and (cache_first or cache_last):
        raise ConfigError("--kv-first, --kv-last: need a cache; name its format with --kv")
    lengths, counts = _numbers("--context", contexts), _numbers("--batch", batches)
    scheme = (
        None if cache is None else bench.cache_scheme(cache, cache_transform, hidden // heads, cache_first, cache_last)
    )
    if scheme is not None and scheme.stored_names:
        raise ConfigError(f"--kv-transform {cache_transform}: cannot be fitted to random weights; take hadamard")
    config = bench.llama_config(hidden, ffn, blocks, heads, kv_heads, vocabulary, max(prompt, *lengths) + 1)
    compiler = None if cache is not None or compiles is False else "inductor"
    works = bench.Works(prompt or None, lengths, scheme, compiler, counts, breakdown)
    rows = bench.bench_model(config, chosen, where, works, lambda line: print(line, file=sys.stderr, flush=True))
    show(bench.model_table(rows))
    print("\n".join(bench.model_lines(rows)))
    for each in bench.breakdown_tables(rows):
        show(each)
    table = {"device": device_name(where), "versions": versions(), "rows": [row.as_record() for row in rows]}
    more = {"config": config.to_diff_dict(), "recipe_toml": chosen.to_toml(), "compiled": compiler is not None}
    write_json(json_file, table | more)
    if any(row.seconds is None or (breakdown and row.cache and row.breakdown is None) for row in rows):
        raise typer.Exit(1)


@benchmarks.command("cache")
def bench_cache_command(
    format: Annotated[str, typer.Option("--kv", metavar="FORMAT", help="Format of keys and values")] = "mxfp4",
    transform: Annotated[
        str,
        typer.Option(
            "--kv-transform", metavar="KIND", help="Transform of keys and values: hadamard, second-moment or none"
        ),
    ] = "hadamard",
    batches: Annotated[str, typer.Option("--batch", help="Numbers of sequences, comma-separated")] = "1,8,32",
    tokens: Annotated[
        str, typer.Option("--context", help="Tokens of each sequence, comma-separated")
    ] = "1024,8192,16384",
    heads: Annotated[int, typer.Option("--heads", min=1, help="Attention heads (the defaults are Llama-3-8B's)")] = 32,
    kv_heads: Annotated[int, typer.Option("--kv-heads", min=1, help="Heads of keys and values")] = 8,
    width: Annotated[int, typer.Option("--width", min=32, help="Width of a head")] = 128,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Measure attention to a packed cache beside PyTorch's.

    PyTorch's reads a bfloat16 cache. What fails its check gets no speed.
    """
    import torch

    from mxrot import api, bench
    from mxrot.environment import device_name, versions

    check_device(device)
    where = torch.device(device or api.default_device())
    if heads % kv_heads:
        raise ConfigError("--heads must be a multiple of --kv-heads")
    scheme, shapes = bench.cache_scheme(format, transform, width), bench.HeadShapes(heads, kv_heads, width)
    sizes = bench.sizes_of(_numbers("--batch", batches), _numbers("--context", tokens))
    limits = {"copy": bench.copy_speed(where)}
    found = bench.bench_cache(where, scheme, sizes, shapes, lambda line: print(line, file=sys.stderr, flush=True))
    show(bench.kernel_table(found, limits))
    table = {"device": device_name(where), "versions": versions(), "ceilings": limits, "cache": scheme.spelled}
    write_json(json_file, table | {"shapes": vars(shapes), "rows": [row.as_record() for row in found]})
    if not all(row.holds for row in found):
        raise typer.Exit(1)


@benchmarks.command("quantize")
def bench_quantize_command(
    model: Model = "demo",
    recipes: Recipes = "duquant++,mxrot",
    changes: Changes = [],  # noqa: B006
    calib: Calib = ["demo"],  # noqa: B006
    samples: Samples = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, help="Tokens in a window (default: the recipe's)")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs of each recipe after the first")] = 3,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Measure time and memory of quantizing a model.

    The first run of each recipe is shown separately.
    """
    import torch

    from mxrot import api, bench
    from mxrot.environment import device_name, versions
    from mxrot.report import progress_on_stderr

    prepare(model, device, json_file)
    where = torch.device(device or api.default_device())
    chosen = [chosen_recipe(name, changes) for name in recipes.split(",")]
    texts = loaded_texts("--calib", calib)
    with progress_on_stderr("Quantizing") as told:
        rows = bench.bench_quantize(model, chosen, where, texts, samples, seq_len, repeats, told)
    show(bench.quantize_table(rows))
    table = {"device": device_name(where), "versions": versions(), "rows": [vars(row) for row in rows]}
    write_json(json_file, table)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """The positive numbers of a comma-separated list."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"{option} {text}: expected positive numbers between commas, such as 1024,16384")
    return tuple(map(int, words))


def _shape(text: str, block: int) -> tuple[int, int]:
    """(N, K) of NxK."""
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise ConfigError(f"--shape {text}: expected the form NxK, such as 4096x4096") from None
    if height < 1 or width < 1 or width % block:
        raise ConfigError(f"--shape {text}: N must be positive and K a multiple of {block}")
    if height * width > MOST_WEIGHTS:
        raise ConfigError(f"--shape {brief(text)}: more than {MOST_WEIGHTS:,} weights")
    return height, width
