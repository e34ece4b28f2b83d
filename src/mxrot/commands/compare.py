"""The commands `mxrot compare` and `mxrot demo`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxrot.commands.cache_options import KvFirst, KvLast, Kvs, KvTransforms, chosen_caches
from mxrot.commands.lines import say
from mxrot.commands.options import (
    KEPT,
    Calib,
    Changes,
    Device,
    Json,
    Limit,
    Model,
    Revision,
    Samples,
    Seed,
    TaskData,
    Tasks,
    Texts,
    Windows,
    announce,
    check_file,
    check_folder,
    chosen_tasks,
    console,
    loaded_texts,
    machine_table,
    prepare,
    print_texts,
    show,
    spelled,
    where,
    with_revision,
    write_json,
)
from mxrot.commands.processes import looks, own_device, told
from mxrot.commands.selection import (
    USUAL,
    Checkpoints,
    Recipes,
    Seeds,
    Without,
    chosen_checkpoints,
    chosen_recipes,
    chosen_seeds,
)
from mxrot.errors import ConfigError

if TYPE_CHECKING:
    from mxrot.report import ComparedRow

_PLACES = ("json_file", "csv_file", "plot", "plots", "html", "work", "resume")
"""The parameters that do not affect the figures."""


def compare(
    ctx: typer.Context,
    model: Model = "demo",
    recipes: Recipes = None,
    checkpoints: Checkpoints = "",
    without: Without = "",
    changes: Changes = [],  # noqa: B006
    calib: Calib = ["demo"],  # noqa: B006
    samples: Samples = None,
    text: Texts = ["demo"],  # noqa: B006
    windows: Windows = None,
    seq_len: Annotated[
        int, typer.Option("--seq-len", min=2, help="Tokens in a window, to calibrate and to evaluate")
    ] = 2048,
    kl_windows: Annotated[
        int | None,
        typer.Option("--kl-windows", min=0, help="Windows for KL to the original; 0 for none (default: all)"),
    ] = None,
    kv: Kvs = None,
    kv_transform: KvTransforms = None,
    kv_first: KvFirst = 0,
    kv_last: KvLast = 0,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    seed: Seed = 0,
    seeds: Seeds = None,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="Folder for finished runs (default: one in the cache)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Use the finished runs of an earlier comparison")] = False,
    revision: Revision = None,
    device: Device = None,
    json_file: Json = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the table to this file as CSV")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw ratio against bits into this file, .png or .svg")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Folder for pictures as PNG, SVG and CSV")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one page with table and pictures")] = None,
) -> None:
    """Compare recipes, quantized in memory, and checkpoints."""
    from mxrot import api
    from mxrot.checkpoint.named_file import write_named
    from mxrot.models import find_model
    from mxrot.ranks import joined
    from mxrot.report import compared_tasks_table, csv_text, picture_file, recovery_table, remarks, side_by_side
    from mxrot.report.comparing import compare_recipes
    from mxrot.report.drawing import check_matplotlib
    from mxrot.report.trade_off import check_plot
    from mxrot.report.work_folder import default_work_folder

    started = time.monotonic()
    folders = chosen_checkpoints(checkpoints)
    chosen = chosen_recipes(recipes or ("none" if folders else USUAL), without, changes)
    each_seed = chosen_seeds(seed, seeds)
    caches = chosen_caches(kv, kv_transform, kv_first, kv_last)
    if not chosen and not caches and not folders:
        raise ConfigError("--recipes none: compares nothing; name recipes, --checkpoints, or caches with --kv")
    check_plot(plot)
    for option, path in (("--plots", plots), ("--html", html)):
        if path is not None:
            check_matplotlib(option)
    model = with_revision(model, revision)
    needs_text = any(not recipe.is_data_free for recipe in chosen) or any(cache.needs_text for cache in caches)
    with joined(device) as world:
        with looks(world):
            if not world.rank:
                check_file("--csv", csv_file)
                check_file("--plot", plot)
                check_file("--html", html)
                check_folder("--plots", plots)
            texts = loaded_texts("--text", text)
            calibration = loaded_texts("--calib", calib) if needs_text else None
            prepare(model, device, None if world.rank else json_file)
            loaded = chosen_tasks(tasks, task_data, limit)
        device = own_device(world, device)
        names = ", ".join([*(recipe.name for recipe in chosen), *folders, *(f"KV {cache.label}" for cache in caches)])
        task = f"{model}, {where(device)}, with {names}"
        with told(world, "Comparing", task) as progress:
            read = api.read_texts(model, texts, windows=windows, seq_len=seq_len, progress=progress)
            place = default_work_folder(find_model(model)) if work is None else work
            ctx.meta[KEPT] = "finished runs"
            rows = compare_recipes(
                model,
                chosen,
                calib=calibration,
                samples=samples,
                texts=read,
                windows=windows,
                seq_len=seq_len,
                seeds=each_seed,
                kl_windows=kl_windows,
                device=device,
                tasks=loaded,
                limit=limit,
                caches=caches,
                checkpoints=folders,
                work=place,
                resume=resume,
                announce=(lambda line: None) if world.rank else announce,
                progress=progress,
            )
    if world.rank:
        return
    for table in side_by_side(rows, f"{model}, windows of {seq_len}", console().width):
        show(table)
        print()
    for line in remarks(rows):
        say(line)
    print_texts([part.as_table() for part in read])
    if loaded:
        show(compared_tasks_table(rows))
        show(recovery_table(rows))
    protocol = {"model": model, "seeds": each_seed, "texts": {part.text.name: part.as_table() for part in read}}
    seconds = round(time.monotonic() - started, 2)
    write_json(
        json_file, {"rows": [row.as_table() for row in rows], **protocol, "seconds": seconds, **machine_table(device)}
    )
    if csv_file is not None:
        write_named(csv_file, csv_text(rows).encode())
    said = [part.as_table() for part in read]
    if any(row.reason is None for row in rows[1:]) and (plots is not None or html is not None):
        _write_pictures(rows, Asked(model, seq_len, said, spelled(ctx, _PLACES), machine_table(device)), plots, html)
    if all(row.reason is not None for row in rows[1:]):
        raise ConfigError("none of them ran; the reasons are below the table")
    if plot is not None:
        write_named(plot, picture_file(rows, f"{model}, windows of {seq_len}", plot.suffix.lower().lstrip(".")))


@dataclass(frozen=True)
class Asked:
    """The data of a comparison's page besides its rows."""

    model: str
    seq_len: int
    texts: list[dict[str, Any]]
    command: str
    machine: dict[str, Any]


def _write_pictures(rows: Sequence[ComparedRow], asked: Asked, plots: Path | None, html: Path | None) -> None:
    """Write every picture as files, and the page with all of them."""
    from mxrot.checkpoint.named_file import write_named
    from mxrot.report import Comparison, compared_page, compared_pictures, write_files

    drawn = compared_pictures(rows, f"{asked.model}, windows of {asked.seq_len}")
    if plots is not None:
        write_files(plots, drawn)
        print(f"{plots}: {len(drawn)} pictures, each as PNG, SVG and CSV")
    if html is not None:
        made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        told = (asked.model, rows, asked.texts, asked.command, asked.machine["device"], asked.machine["versions"], made)
        written = compared_page(Comparison(*told), drawn).encode()
        write_named(html, written)
        print(f"{html}: {len(written) / 1e6:.1f} MB")


def demo(seed: Seed = 0, device: Device = None, json_file: Json = None) -> None:
    """Quantize the demo model with rtn and duquant++, and compare."""
    from mxrot.recipe import load_recipe
    from mxrot.report import comparison_table, progress_on_stderr
    from mxrot.report.comparing import compare_recipes

    prepare("demo", device, json_file)
    with progress_on_stderr("Demo", f"the demo model, {where(device)}, with rtn and duquant++") as told:
        rows = compare_recipes(
            "demo",
            [load_recipe("rtn"), load_recipe("duquant++")],
            samples=8,
            windows=16,
            seq_len=512,
            seed=seed,
            device=device,
            kl_windows=0,
            prompt="The three primary colors are",
            progress=told,
        )
    rows.sort(key=lambda row: row.recipe == "duquant++")  # the plainest first
    show(comparison_table(rows, "SmolLM2-135M-Instruct, weights and activations in MXFP4; held-out demo text"))
    for row in rows:
        print(f"{row.recipe}: {row.extra['generated']}")
    write_json(json_file, {"rows": [row.as_table() for row in rows]})
