"""The command `mxrot report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxrot.commands.options import (
    Device,
    Revision,
    Texts,
    Verify,
    check_file,
    check_folder,
    loaded_texts,
    prepare,
    where,
    with_revision,
)
from mxrot.commands.processes import looks, own_device, told
from mxrot.errors import ConfigError


def report(
    model: Annotated[str, typer.Argument(help="Checkpoint that mxrot wrote")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write")] = Path("report.html"),
    against: Annotated[str | None, typer.Option("--against", metavar="MODEL", help="The original")] = None,
    text: Texts = ["demo"],  # noqa: B006 (typer copies it)
    windows: Annotated[int, typer.Option("--windows", min=1, help="Maximum number of windows of the text")] = 8,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens in a window")] = 512,
    sites: Annotated[
        list[str], typer.Option("--site", metavar="PATTERN", help="Site to draw, repeatable, e.g. 3.mlp.down_proj")
    ] = [],  # noqa: B006
    results: Annotated[
        Path | None, typer.Option("--results", help="Figures of the checkpoint, from eval --json; none are measured")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="Figures of the original, from eval --json; with --results")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Folder for the pictures as PNG, SVG and CSV")] = None,
    surface: Annotated[bool, typer.Option("--surface", help="Also draw |x| over token and channel in 3-D")] = False,
    card: Annotated[bool, typer.Option("--card", help="Also put the figures into the checkpoint's README.md")] = False,
    revision: Revision = None,
    device: Device = None,
    verify: Verify = None,
) -> None:
    """Write a report of a checkpoint: one HTML file.

    With torchrun several processes share the measurements.
    """
    from mxrot.checkpoint import write_metrics
    from mxrot.checkpoint.named_file import write_named
    from mxrot.models import find_model
    from mxrot.ranks import joined
    from mxrot.report import check_matplotlib, page, pictures, read_results, write_files
    from mxrot.report import measuring as reporting

    check_matplotlib()
    if baseline is not None and results is None:
        raise ConfigError("--baseline: give the figures of the checkpoint with --results, too")
    with joined(device) as world:
        with looks(world):
            if not world.rank:
                _check_places(output, plots)
            loaded_texts("--text", text)  # errors are found at once
            model = with_revision(model, revision)
            prepare(model, device, None)
            if against is not None:
                prepare(against, device, None)
            measured = None if results is None else read_results(results)
            of_original = None if baseline is None else read_results(baseline)
        device = own_device(world, device)
        request = reporting.Request(
            *(model, against, text, windows, seq_len, sites, measured, of_original),
            surface=surface,
            folder=output.parent,
            verify=verify,
        )
        with told(world, "Reporting", f"{model}, {where(device)}, into {output}") as progress:
            contents = reporting.gather(request, device, progress)
            if contents is not None:
                drawn = pictures(contents)
                written = page(contents, drawn)
                write_named(output, written.encode())
                if plots is not None:
                    write_files(plots, drawn)
    if contents is None:
        return
    print(f"{output}: {len(written.encode()) / 1e6:.1f} MB")
    if plots is not None:
        print(f"{plots}: {len(drawn)} pictures, each as PNG, SVG and CSV")
    if card:
        write_metrics(find_model(model), contents.metrics)
        print(f"{find_model(model) / 'README.md'}: {len(contents.metrics)} figures")


def _check_places(output: Path, plots: Path | None) -> None:
    """ConfigError if a requested file or folder cannot be written."""
    check_file("--output", output)
    check_folder("--plots", plots)
