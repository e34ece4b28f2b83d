"""Several recipes on one model, side by side and in memory."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mxrot import api, quantizing
from mxrot.evaluation import score_tasks
from mxrot.layers import ModelSize, QuantLinear, build_apart
from mxrot.models import FolderSource, find_model
from mxrot.progress import Progress, silent
from mxrot.quantizing.problems import find_problems
from mxrot.recipe import Recipe
from mxrot.report import ComparedRow
from mxrot.text import load_texts
from mxrot.tokenizing import Calibration

_TYPE_NAMES = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32", torch.float64: "FP64"}


def compare_recipes(
    model: str,
    recipes: Sequence[Recipe],
    *,
    calib: Any = "demo",
    samples: int | None = None,
    texts: Any = "demo",
    windows: int | None = None,
    seq_len: int = 2048,
    seed: int = 0,
    device: str | None = None,
    prompt: str | None = None,
    tasks: dict[str, Any] | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> list[ComparedRow]:
    """The model as it is, then quantized by each recipe: perplexity on `texts`, size, seconds to quantize.

    `tasks` are those of `evaluation.load_tasks`, of which `limit` takes the first examples. With a `prompt`, each row's
    `extra["generated"]` is what the model makes of it. One model is in memory at a time.
    """
    folder = find_model(model)
    source = FolderSource(folder, model)
    skeleton = build_apart(source.config)
    for recipe in recipes:
        for problem in find_problems(skeleton, source.family, recipe, model, source):
            raise problem
    tokenizer = api.load_tokenizer(folder)
    read = api.read_texts(folder, texts, windows=windows, seq_len=seq_len, progress=progress)
    if not all(recipe.is_data_free for recipe in recipes):
        calib = load_texts(calib, "calibration")
    calibrations = [api.calibrate(folder, recipe, calib, samples, seq_len, progress) for recipe in recipes]
    device = device or api.default_device()
    stored = source.dtype
    rows = []
    entries: list[Calibration | None] = [None, *calibrations]
    for entry in entries:
        seconds = None
        if entry is None:
            label, (opened, _) = _TYPE_NAMES[stored], api.open_model(folder, device)
        else:
            recipe = entry.recipe
            label, told = recipe.name, _labelled(progress, recipe.name)
            started = time.monotonic()
            result = quantizing.quantize(folder, recipe, windows=entry.windows, device=device, seed=seed, progress=told)
            seconds = time.monotonic() - started
            assert result.model is not None
            opened = result.model
        told = _labelled(progress, f"perplexity of {label}")
        scores = api.evaluate(opened, read, tokenizer=tokenizer, progress=told)
        told = _labelled(progress, f"tasks of {label}")
        shares = score_tasks(opened, tokenizer, tasks, limit=limit, progress=told) if tasks else {}
        extra = {} if prompt is None else {"generated": _sentence(opened, tokenizer, prompt)}
        rows.append(ComparedRow(label, model_size(opened, stored), seconds, scores, extra, shares))
        del opened
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def model_size(model: PreTrainedModel, stored: torch.dtype) -> ModelSize:
    """Bytes the model takes in a checkpoint: what is not quantized counts in the type `stored`."""
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    head = model.get_output_embeddings()
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    left = {f"{name}.weight" for name, module in linears if module is not head}
    return ModelSize.of(model.state_dict(), quantized, stored.itemsize, left)


def _labelled(progress: Progress, label: str) -> Progress:
    def told(done: float, total: int, what: str) -> None:
        progress(done, total, f"{label}, {what}")

    return told


def _sentence(model: PreTrainedModel, tokenizer: Any, prompt: str) -> str:
    """The prompt and the first sentence that the model makes of it."""
    continuation = api.generate_text(model, tokenizer, prompt, max_tokens=32)
    sentence = re.split(r"(?<=[.!?])\s|\n", continuation.strip(), maxsplit=1)[0]
    return f"{prompt} {sentence}"
