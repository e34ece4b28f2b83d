"""The command `mxrot generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mxrot.commands.cache_options import Kv, KvCalib, KvFirst, KvLast, KvTransform, cache_asked_for
from mxrot.commands.options import Device, Model, Revision, Verify, prepare, with_revision


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens at most")] = 60,
    kv: Kv = None,
    kv_transform: KvTransform = None,
    kv_first: KvFirst = 0,
    kv_last: KvLast = 0,
    calib: KvCalib = [],  # noqa: B006
    revision: Revision = None,
    device: Device = None,
    verify: Verify = None,
) -> None:
    """Continue a prompt, greedily."""
    from mxrot import api
    from mxrot.models import find_model, read_config
    from mxrot.prompting import continue_prompt, new_tokens, position_count, prompt_ids
    from mxrot.tokenizing import reader_for

    asked = cache_asked_for(kv, kv_transform, kv_first, kv_last, calib)
    model = with_revision(model, revision)
    prepare(model, device, None)
    asked.check(model)
    folder = find_model(model)
    config, tokenizer = read_config(folder), api.load_tokenizer(folder)
    ids = prompt_ids(prompt, reader_for(config, tokenizer))
    count = new_tokens(config, ids.shape[1], max_tokens)
    if count < max_tokens:
        print(
            f"mxrot: {count} new tokens instead of {max_tokens}: the model has {position_count(config)} positions, and "
            f"the prompt takes {ids.shape[1]}",
            file=sys.stderr,
            flush=True,
        )
    opened, _ = asked.open(model, device, verify)
    print(prompt + continue_prompt(opened, tokenizer, ids, count))
