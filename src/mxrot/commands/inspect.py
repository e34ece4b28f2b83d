"""The command `mxrot inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mxrot.commands.lines import say
from mxrot.commands.options import (
    Device,
    FamilyOption,
    Json,
    Model,
    Revision,
    Verify,
    prepare,
    print_texts,
    show,
    where,
    with_revision,
    write_json,
)
from mxrot.commands.order import check_sort, first_errors, first_sites


def inspect(
    model: Model = "demo",
    text: Annotated[str, typer.Option("--text", metavar="TEXT", help="Text for the activations")] = "demo",
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of the text")] = 4,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens in a window")] = 512,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also show which kernel computes each linear, and why")
    ] = False,
    top: Annotated[
        int | None, typer.Option("--top", min=1, metavar="N", help="Maximum number of lines in a table")
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort", metavar="KEY", help="Column to sort by, largest first: ratio, largest, median, weights, output"
        ),
    ] = None,
    family: FamilyOption = None,
    revision: Revision = None,
    device: Device = None,
    verify: Verify = None,
    json_file: Json = None,
) -> None:
    """Show outliers in the inputs, and errors of a checkpoint.

    With --family auto, show only the record that is derived for the model.
    """
    if family is not None:
        _show_family(with_revision(model, revision), family, json_file)
        return
    key = sort or ("model" if top is None else "ratio")
    check_sort(key)
    from mxrot import api
    from mxrot.checkpoint import has_run, is_checkpoint, read_run
    from mxrot.evaluation import attention_operands, cache_schemes, kernel_choices, quantizers, site_maxima
    from mxrot.models import find_family
    from mxrot.planning.plan import kept_table
    from mxrot.report import (
        changes_line,
        choice_line,
        choices_table,
        errors_table,
        experts_line,
        family_line,
        head_line,
        kept_line,
        left_line,
        maxima_table,
        passed_line,
        progress_on_stderr,
        rank_line,
        recipe_line,
        rotation_line,
        sites_choice_line,
        size_line,
        tuning_line,
    )
    from mxrot.text import load_text

    loaded = load_text(text, "evaluation")
    model = with_revision(model, revision)
    prepare(model, device, json_file)
    with progress_on_stderr("Inspecting", f"{model}, {where(device)}") as told:
        read = api.read_texts(model, loaded, windows=windows, seq_len=seq_len, progress=told)
        told(0, 1, f"opening {model}")
        opened, folder = api.open_model(model, device, verify)
        known = find_family(opened.config, model)
        sites = site_maxima(opened, known, read[0].ids, progress=told)
    prefix = f"{known.blocks}."
    show(maxima_table(first_sites(sites, key, top, prefix)))
    print_texts([part.as_table() for part in read])
    kept = known.kept_counts(opened.config.get_text_config().num_hidden_layers)
    for one, blocks in kept:
        say(kept_line(one, blocks))
    result: dict[str, Any] = {"model": model, "sites": [{**vars(site), "ratio": site.ratio} for site in sites]}
    result |= {"kept": kept_table(kept)}
    if is_checkpoint(folder) and has_run(folder):
        run = read_run(folder)
        show(errors_table(first_errors(run["blocks"], key, top, prefix)))
        say(size_line(run["size"]))
        linears = quantizers(opened)
        for spelled, count in linears.items():
            say(f"{count} linears: {spelled}")
        attention = attention_operands(opened)
        for spelled, count in attention.items():
            say(f"attention of {count} decoder blocks: {spelled}")
        cache = cache_schemes(opened)
        for spelled, count in cache.items():
            say(f"cache of {count} decoder blocks: {spelled}")
        lines = (
            family_line,
            changes_line,
            head_line,
            passed_line,
            left_line,
            recipe_line,
            rank_line,
            rotation_line,
            choice_line,
            sites_choice_line,
            tuning_line,
            experts_line,
        )
        for line in filter(None, (said(run) for said in lines)):
            say(line)
        result |= {"blocks": run["blocks"], "size": run["size"], "quantizers": linears, "attention": attention}
        result |= {"cache": cache} | ({"head": run["head"]} if run.get("head") else {})
    if kernels:
        choices = kernel_choices(opened)
        show(choices_table(choices))
        result["kernels"] = [vars(choice) for choice in choices]
    write_json(json_file, result)


def _show_family(model: str, family: str, json_file: Path | None) -> None:
    """Show the record of the chosen family, as Python text. No weight is read."""
    from mxrot.deriving import asked_family, record_text
    from mxrot.models import find_config
    from mxrot.models.family_table import family_table

    prepare(model, None, json_file, gets_weights=False)
    with asked_family(family, find_config(model), model) as found:
        assert found is not None
        say(record_text(found).rstrip())
        write_json(json_file, {"model": model, "family": family_table(found)})
