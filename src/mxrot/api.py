"""The package's own functions: what the command line does, for Python.

mxrot.quantize("demo", "duquant++", output="out")
model = mxrot.load("out")
mxrot.evaluate(model, text="demo")
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from mxrot import pipeline
from mxrot.checkpoint import check_exportable, check_output, hash_model, quantize_to_folder, with_config
from mxrot.checkpoint import load as load_checkpoint
from mxrot.evaluation import (
    Answers,
    Divergence,
    Perplexity,
    TaskScore,
    divergence,
    load_tasks,
    perplexity,
    score_tasks,
)
from mxrot.models import find_model, read_config
from mxrot.opening import base_name, check_original, default_device, is_verifiable, load_tokenizer, open_model
from mxrot.progress import Progress, silent
from mxrot.prompting import generate_text
from mxrot.reading import calibrate, evaluation_windows, reader_for
from mxrot.recipe import Recipe, load_recipe
from mxrot.records import device_name, kernel_choices, versions
from mxrot.text import Windows, load_texts

__all__ = [
    "base_name",
    "calibrate",
    "default_device",
    "diverge",
    "evaluate",
    "evaluate_tasks",
    "generate_text",
    "is_verifiable",
    "kept_answers",
    "load",
    "load_tokenizer",
    "open_model",
    "quantize",
    "read_texts",
]

DEFAULT_RECIPE = "mxrot"
EVALUATION_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens that pass through a model at once."""


def quantize(
    model: str | Path | PreTrainedModel = "demo",
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    output: str | Path | None = None,
    *,
    calib: Any = "demo",
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | None = None,
    force: bool = False,
    resume: bool = False,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> PreTrainedModel | dict[str, Any]:
    """Quantize a model by its hub id, folder, or `demo`; or one that is loaded, which stays as it is.

    With `output` a checkpoint folder is written and the contents of its run.json come back; without it the
    quantized model, ready to run on `device`, with `generate` and `save_pretrained`. A loaded model needs its
    `tokenizer`, unless the recipe needs no text, and is written to a temporary folder first.
    `calib` is a text, or several, as docs/text.md lists them: names, rows, token ids, tensors, data sets.
    `samples` and `seq_len` replace the recipe's calibration windows.
    Errors are those of mxrot.errors, raised before any weight is read where that is possible.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if isinstance(model, PreTrainedModel):
        if tokenizer is None and not chosen.is_data_free:
            raise TypeError("quantize needs the tokenizer of a model that is passed itself")
        with tempfile.TemporaryDirectory(prefix="mxrot-") as saved:
            named = Path(saved) / (Path(model.name_or_path or "").name or type(model).__name__)
            model.save_pretrained(named)
            if tokenizer is not None:
                tokenizer.save_pretrained(named)
            options: dict[str, Any] = {"force": force, "resume": resume, "progress": progress, "seed": seed}
            texts: dict[str, Any] = {"calib": calib, "samples": samples, "seq_len": seq_len}
            return quantize(named, chosen, output, device=device or str(model.device), **texts, **options)
    if output is not None:
        output = Path(output).expanduser()
        check_exportable(chosen)
        check_output(output, force or resume)
    loaded = None if chosen.is_data_free else load_texts(calib, "calibration")
    folder = find_model(str(model))
    check_original(folder, str(model))
    calibration = calibrate(folder, chosen, loaded, samples, seq_len, progress)
    chosen = calibration.recipe
    device = device or default_device()
    if output is None:
        result = pipeline.quantize(
            folder, chosen, windows=calibration.windows, device=device, seed=seed, progress=progress
        )
        assert result.model is not None
        return with_config(result.model, chosen)
    return quantize_to_folder(
        folder,
        chosen,
        output,
        base_name=base_name(str(model), folder),
        windows=calibration.windows,
        data=calibration.description,
        device=device,
        seed=seed,
        force=force,
        resume=resume,
        progress=progress,
    )


@torch.inference_mode(False)
def load(
    folder: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool | None = None,
    keeps_fp8: bool = False,
) -> PreTrainedModel:
    """The quantized model in a checkpoint folder, as `mxrot.checkpoint.load` gives it; on the GPU if there is one.

    Also inside `torch.inference_mode` its tensors are ordinary ones, which know when they were changed.
    """
    return load_checkpoint(folder, device or default_device(), dtype, verify, keeps_fp8)


def evaluate(
    model: PreTrainedModel | str | Path,
    text: Any = "demo",
    *,
    tokenizer: Any = None,
    windows: int | None = None,
    seq_len: int = 2048,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Perplexity]:
    """Perplexity on each text, by the text's name. A model that is passed itself needs its `tokenizer`.

    `text` is a text, or several, as docs/text.md lists them. Windows that are given as such keep their own length.
    """
    read = read_texts(model, text, tokenizer=tokenizer, windows=windows, seq_len=seq_len, progress=progress)
    model, _ = _opened(model, tokenizer, device)
    return {part.text.name: perplexity(model, part.ids, _batch_windows(model, part), progress) for part in read}


def read_texts(
    model: PreTrainedModel | str | Path,
    text: Any = "demo",
    *,
    tokenizer: Any = None,
    windows: int | None = None,
    seq_len: int = 2048,
    progress: Progress = silent,
) -> list[Windows]:
    """The windows of each text as `evaluate` reads them, and what was left out; `evaluate` and `diverge` take them.

    Of a model by its name only the config and the tokenizer are read. ConfigError if a token is beyond its embedding.
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise TypeError("evaluate needs the tokenizer of a model that is passed itself")
        rows = cast(Any, model).get_input_embeddings().weight.shape[0]
        reader = reader_for(model.config, tokenizer, rows)
    else:
        folder = find_model(str(model))
        reader = reader_for(read_config(folder), tokenizer or load_tokenizer(folder))
    return evaluation_windows(text, reader, windows, seq_len, progress)


def diverge(
    model: PreTrainedModel | str | Path,
    original: PreTrainedModel | str | Path,
    text: Any = "demo",
    *,
    tokenizer: Any = None,
    windows: int | None = None,
    seq_len: int = 2048,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Divergence]:
    """How far `model` is from `original` on each text, by the text's name; both are on the device at once.

    Models that are passed themselves need their `tokenizer`.
    """
    if tokenizer is None and not isinstance(original, PreTrainedModel):
        tokenizer = load_tokenizer(find_model(str(original)))
    read = read_texts(model, text, tokenizer=tokenizer, windows=windows, seq_len=seq_len, progress=progress)
    original, _ = _opened(original, tokenizer, device)
    model, _ = _opened(model, tokenizer, device)
    return {
        part.text.name: divergence(model, original, part.ids, _batch_windows(model, part), progress) for part in read
    }


def evaluate_tasks(
    model: PreTrainedModel | str | Path,
    tasks: str | Sequence[str],
    *,
    tokenizer: Any = None,
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, TaskScore]:
    """Scores in tasks of lm-eval, by their names; needs `pip install 'mxrot[tasks]'`.

    The tasks' data are those of the hub, or of the folder `data`; `limit` takes the first examples of each. A model
    that is passed itself needs its `tokenizer`.
    """
    loaded = load_tasks([tasks] if isinstance(tasks, str) else tasks, None if data is None else Path(data))
    model, tokenizer = _opened(model, tokenizer, device)
    if tokenizer is None:
        raise TypeError("evaluate_tasks needs the tokenizer of a model that is passed itself")
    return score_tasks(model, tokenizer, loaded, limit=limit, batch_size=batch_size, progress=progress)


def kept_answers(path: Path, model: PreTrainedModel, folder: Path, resume: bool = False) -> Answers:
    """Answers to tasks in a file, for the model opened from `folder`.

    With `resume` those that the file has; ConfigError if they were given by another model, device or version.
    """
    owner = {
        "model": hash_model(folder)[0],
        "dtype": str(model.dtype),
        "device": device_name(model.device),
        "kernels": kernel_choices(model.device),
        "versions": versions(tasks=True),
    }
    return Answers(path, owner, resume)


def _opened(model: PreTrainedModel | str | Path, tokenizer: Any, device: str | None) -> tuple[PreTrainedModel, Any]:
    """The model, opened where only its name is given, and a tokenizer: its own unless one is given."""
    if isinstance(model, PreTrainedModel):
        return model, tokenizer
    opened, folder = open_model(model, device)
    return opened, tokenizer or load_tokenizer(folder)


def _batch_windows(model: PreTrainedModel, windows: Windows) -> int:
    """Windows that pass through the model at once."""
    return max(1, EVALUATION_TOKENS.get(next(model.parameters()).device.type, 2048) // windows.ids.shape[1])
