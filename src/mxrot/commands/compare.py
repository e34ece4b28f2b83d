"""The commands `mxrot compare` and `mxrot demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from mxrot.commands.options import (
    Calib,
    Changes,
    Device,
    Json,
    Limit,
    Model,
    Recipes,
    Revision,
    Samples,
    Seed,
    TaskData,
    Tasks,
    Texts,
    Windows,
    chosen_recipe,
    chosen_tasks,
    loaded_texts,
    prepare,
    print_texts,
    show,
    where,
    with_revision,
    write_json,
)
from mxrot.errors import ConfigError


def compare(
    model: Model = "demo",
    recipes: Recipes = "rtn,duquant++",
    changes: Changes = [],  # noqa: B006
    calib: Calib = ["demo"],  # noqa: B006
    samples: Samples = None,
    text: Texts = ["demo"],  # noqa: B006
    windows: Windows = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens a window, for both")] = 2048,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Quantize a model in memory with several recipes, and compare."""
    from mxrot import api
    from mxrot.report import compared_tasks_table, comparison_table, progress_on_stderr
    from mxrot.report.comparing import compare_recipes

    chosen = [chosen_recipe(name.strip(), changes) for name in recipes.split(",") if name.strip()]
    if not chosen:
        raise ConfigError("--recipes: name at least one")
    texts = loaded_texts("--text", text)
    needs_text = any(not recipe.is_data_free for recipe in chosen)
    calibration = loaded_texts("--calib", calib) if needs_text else None
    model = with_revision(model, revision)
    prepare(model, device, json_file)
    loaded = chosen_tasks(tasks, task_data, limit)
    names = ", ".join(recipe.name for recipe in chosen)
    with progress_on_stderr("Comparing", f"{model}, {where(device)}, with {names}") as told:
        read = api.read_texts(model, texts, windows=windows, seq_len=seq_len, progress=told)
        rows = compare_recipes(
            model,
            chosen,
            calib=calibration,
            samples=samples,
            texts=read,
            windows=windows,
            seq_len=seq_len,
            seed=seed,
            device=device,
            tasks=loaded,
            limit=limit,
            progress=told,
        )
    show(comparison_table(rows, f"{model}, windows of {seq_len}"))
    print_texts([part.as_table() for part in read])
    if loaded:
        show(compared_tasks_table(rows))
    write_json(json_file, {"rows": [row.as_table() for row in rows]})


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
            prompt="The three primary colors are",
            progress=told,
        )
    show(comparison_table(rows, "SmolLM2-135M-Instruct, weights and activations in MXFP4; held-out demo text"))
    for row in rows:
        print(f"{row.recipe}: {row.extra['generated']}")
    write_json(json_file, {"rows": [row.as_table() for row in rows]})
