"""The command `mxrot generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from mxrot.commands.options import Device, Model, prepare


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
