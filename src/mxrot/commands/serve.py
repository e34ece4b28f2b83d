"""The command `mxrot serve`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mxrot.commands.options import Revision, Verify, prepare, with_revision
from mxrot.errors import ConfigError


def serve(
    model: Annotated[str, typer.Argument(help="Folder that mxrot quantize wrote, or its hub id")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Options of the server, after --")
    ] = None,
    program: Annotated[str, typer.Option("--program", help="vllm, transformers, or auto: vllm if installed")] = "auto",
    stock: Annotated[bool, typer.Option("--stock", help="Stock vLLM, without mxrot's plugin")] = False,
    tensor_parallel: Annotated[
        int | None,
        typer.Option("--tensor-parallel", min=1, help="GPUs that share the model (default: the fewest that hold it)"),
    ] = None,
    max_len: Annotated[
        int | None, typer.Option("--max-len", min=2, help="Longest request in tokens (default: the model's positions)")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command that would run, and stop")] = False,
    revision: Revision = None,
    verify: Verify = None,
) -> None:
    """Serve a checkpoint over HTTP, by vLLM or transformers."""
    from mxrot.models import find_model
    from mxrot.vllm.facts import Facts
    from mxrot.vllm.serving import Machine, Wish, server_for

    wish = Wish(program, stock, tensor_parallel, max_len, tuple(more or ()))
    model = with_revision(model, revision)
    prepare(model, None, None)
    folder = find_model(model)
    server = server_for(folder, Facts.written(folder, verify), wish, Machine.here())
    for line in server.lines:
        print(line)
    if server.missing is not None and not dry_run:
        raise ConfigError(f"{folder}: {server.missing}")
    if server.missing is not None:
        print(f"cannot be started here: {server.missing}")
    print(server.line, flush=True)
    if not dry_run:
        sys.stderr.flush()
        os.execv(server.words[0], server.words)
