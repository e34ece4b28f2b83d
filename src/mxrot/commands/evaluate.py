"""The command `mxrot eval`."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated, Any

import typer

from mxrot.commands.cache_options import (
    Kv,
    KvCalib,
    KvFirst,
    KvLast,
    KvTransform,
    cache_asked_for,
)
from mxrot.commands.options import (
    KEPT,
    Device,
    FamilyOption,
    Json,
    Limit,
    Model,
    Revision,
    TaskData,
    Tasks,
    Texts,
    Verify,
    Windows,
    check_resume,
    chosen_tasks,
    loaded_texts,
    partial_file,
    prepare,
    print_texts,
    show,
    where,
    with_revision,
    write_json,
)
from mxrot.commands.processes import looks, own_device, told


def evaluate(
    ctx: typer.Context,
    model: Model = "demo",
    text: Texts = [],  # noqa: B006
    windows: Windows = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens in a window")] = 2048,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="The original; measures the distance from it, token by token"),
    ] = None,
    kv: Kv = None,
    kv_transform: KvTransform = None,
    kv_first: KvFirst = 0,
    kv_last: KvLast = 0,
    calib: KvCalib = [],  # noqa: B006
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Requests at once (default: by device)")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue --tasks where an earlier run with --json ended")
    ] = False,
    family: FamilyOption = None,
    revision: Revision = None,
    device: Device = None,
    verify: Verify = None,
    json_file: Json = None,
) -> None:
    """Measure the perplexity of a model, and its scores in tasks.

    The text is demo if neither texts nor tasks are named. With torchrun several processes share the work.
    """
    from mxrot import api
    from mxrot.deriving import asked_family, check_asked
    from mxrot.environment import versions
    from mxrot.evaluation import Answers, cache_table, score_tasks
    from mxrot.kernels.choices import kernel_choices
    from mxrot.models import find_config
    from mxrot.ranks import joined
    from mxrot.report import divergence_table, perplexity_table, tasks_table

    check_resume(resume, tasks, json_file)
    check_asked(family)
    model = with_revision(model, revision)
    started = time.monotonic()
    apart = None
    results, scores = {}, {}
    with joined(device) as world, contextlib.ExitStack() as stack:
        with looks(world):
            texts = loaded_texts("--text", text or ([] if tasks and against is None else ["demo"]))
            asked = cache_asked_for(kv, kv_transform, kv_first, kv_last, calib, seq_len)
            prepare(model, device, None if world.rank else json_file)
            if against is not None:
                prepare(against, device, None)
            if family is not None:
                named = against or model
                stack.enter_context(asked_family(family, find_config(named), named))
            asked.check(model)
            loaded = chosen_tasks(tasks, task_data, limit)
        device = own_device(world, device)
        task = f"{model}, {where(device)}, on {', '.join([*(text.name for text in texts), *loaded])}"
        if against is not None:
            task += f", against {against}"
        progress = stack.enter_context(told(world, "Evaluating", task))
        read = api.read_texts(model, texts, windows=windows, seq_len=seq_len, progress=progress) if texts else []
        progress(0, 1, f"opening {model}")
        opened, folder = asked.open(model, device, verify, progress)
        tokenizer = api.load_tokenizer(folder)
        answers = None
        if loaded and json_file is not None:
            if not world.rank:
                answers = stack.enter_context(api.kept_answers(partial_file(json_file), opened, folder, resume))
                ctx.meta[KEPT] = "answers to tasks"
            answers = (answers or Answers()).shared_by(world)
        if against is not None:
            original, _ = api.open_model(against, device, verify and api.is_verifiable(against))
            apart = api.diverge(opened, original, read, tokenizer=tokenizer, device=device, progress=progress)
            results = {name: found.perplexity for name, found in apart.items()}
        elif read:
            results = api.evaluate(opened, read, tokenizer=tokenizer, progress=progress)
        if loaded:
            options: dict[str, Any] = {
                "limit": limit,
                "batch_size": batch_size,
                "answers": answers,
                "progress": progress,
            }
            scores = score_tasks(opened, tokenizer, loaded, **options, world=world)
    if world.rank:
        return
    if results:
        show(perplexity_table(model, results))
    cache = cache_table(opened)
    if cache is not None:
        print(f"read through a cache: {cache['scheme']}; {cache['bits_per_element']:.4g} bits an element")
    print_texts([part.as_table() for part in read])
    if apart is not None:
        show(divergence_table(model, str(against), apart))
    if scores:
        show(tasks_table(model, scores))
    table = {
        "model": model,
        "perplexity": {name: vars(result) for name, result in results.items()},
        "texts": {part.text.name: part.as_table() for part in read},
        "cache": cache,
        "against": against,
        "divergence": None if apart is None else {name: vars(result) for name, result in apart.items()},
        "tasks": {name: score.as_table() for name, score in scores.items()},
        "processes": world.size,
        "seconds": round(time.monotonic() - started, 2),
        "kernels": kernel_choices(opened.device),
        "versions": versions(tasks=bool(scores)),
    }
    write_json(json_file, table)
    if answers is not None:
        answers.remove()
