"""The command `mxrot generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mxrot.commands.cache_options import Kv, KvCalib, KvFirst, KvLast, KvTransform, cache_asked_for
from mxrot.commands.options import Device, Model, Revision, Seed, Verify, prepare, with_revision
from mxrot.errors import ConfigError


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Maximum number of new tokens")] = 60,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template, and print only the answer")] = False,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message for --chat")] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Temperature of sampling; 0 takes the most probable token")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the most probable tokens that add up to this"),
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Sample from this many tokens; 0 is all")] = 0,
    seed: Seed = 0,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print each word as it is written (default: on a terminal)"),
    ] = None,
    kv: Kv = None,
    kv_transform: KvTransform = None,
    kv_first: KvFirst = 0,
    kv_last: KvLast = 0,
    calib: KvCalib = [],  # noqa: B006
    revision: Revision = None,
    device: Device = None,
    verify: Verify = None,
) -> None:
    """Continue a prompt, or answer a question."""
    from mxrot import api
    from mxrot.models import find_model, read_config
    from mxrot.prompting import Sampling, chat_ids, continue_prompt, new_tokens, position_count, prompt_ids
    from mxrot.tokenizing import reader_for

    _check(chat, system, temperature, top_p, top_k)
    asked = cache_asked_for(kv, kv_transform, kv_first, kv_last, calib)
    model = with_revision(model, revision)
    prepare(model, device, None)
    asked.check(model)
    folder = find_model(model)
    config, tokenizer = read_config(folder), api.load_tokenizer(folder)
    reader = reader_for(config, tokenizer)
    ids = chat_ids(prompt, system, reader) if chat else prompt_ids(prompt, reader)
    count = new_tokens(config, ids.shape[1], max_tokens)
    if count < max_tokens:
        print(
            f"mxrot: {count} new tokens instead of {max_tokens}: the model has {position_count(config)} positions, and "
            f"the prompt takes {ids.shape[1]}",
            file=sys.stderr,
            flush=True,
        )
    opened, _ = asked.open(model, device, verify)
    streams = sys.stdout.isatty() if stream is None else stream
    begin = "" if chat else prompt
    if streams:
        print(begin, end="", flush=True)
    told = continue_prompt(opened, tokenizer, ids, count, Sampling(temperature, top_p, top_k, seed), streams)
    if not streams:
        print(begin + told)


def _check(chat: bool, system: str | None, temperature: float, top_p: float, top_k: int) -> None:
    """ConfigError if an option would have no effect."""
    if system is not None and not chat:
        raise ConfigError("--system: needs --chat; add it")
    if not temperature and (top_p < 1 or top_k):
        raise ConfigError(
            f"--top-{'p' if top_p < 1 else 'k'}: needs sampling; add --temperature 1, or another temperature"
        )
    if top_p == 0:
        raise ConfigError("--top-p 0: leaves no token to draw; give a probability above 0")
