"""The command `mxrot export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxrot.commands.options import Json, Verify, console, prepare, write_json
from mxrot.errors import ConfigError
from mxrot.nearest import not_known
from mxrot.shell import command, expanded


def export(
    model: Annotated[str, typer.Argument(help="Folder that mxrot quantize wrote")],
    to: Annotated[str, typer.Option("--to", metavar="PROGRAM", help="Program to run it with: vllm")] = "vllm",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write (default: only check the checkpoint)")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output folder that is not empty")] = False,
    verify: Verify = None,
    json_file: Json = None,
) -> None:
    """Say what vLLM does with a checkpoint, and write it for vLLM."""
    from mxrot.models import find_model
    from mxrot.report import print_vllm_report
    from mxrot.vllm.export import export_for_vllm
    from mxrot.vllm.verdict import check_for_vllm

    if to != "vllm":
        raise ConfigError(f"--to: {not_known('program', to, ['vllm'])}")
    prepare(model, None, json_file)
    folder = find_model(model)
    report = check_for_vllm(folder, verify) if output is None else export_for_vllm(folder, expanded(output), force)
    print_vllm_report(report, console())
    if output is not None:
        print(f"{output}: written; next: {command('vllm', 'serve', output)}")
    places = {"folder": str(output or folder), "output": None if output is None else str(output)}
    write_json(json_file, report.as_table() | places)
