"""The package's own functions: what the command line does, for Python.

mxrot.quantize("demo", "duquant++", output="out")
model = mxrot.load("out")
mxrot.evaluate(model, text="demo")
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from mxrot import pipeline
from mxrot.checkpoint import check_exportable, check_output, load, quantize_to_folder, with_config
from mxrot.errors import ConfigError
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
from mxrot.models import WeightFiles, find_family, find_model, read_config, start_token
from mxrot.opening import base_name, default_device, load_tokenizer, open_model
from mxrot.progress import Progress, silent
from mxrot.recipe import Recipe, load_recipe
from mxrot.records import device_name, versions
from mxrot.text import Text, load_text, token_windows

__all__ = [
    "base_name",
    "calibrate",
    "default_device",
    "diverge",
    "evaluate",
    "evaluate_tasks",
    "generate_text",
    "kept_answers",
    "load",
    "load_tokenizer",
    "open_model",
    "quantize",
]

DEFAULT_RECIPE = "mxrot"
EVALUATION_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens that pass through a model at once."""


@dataclass(frozen=True)
class Calibration:
    """Token windows, and where they came from."""

    windows: Tensor | None
    description: dict[str, Any] | None


def quantize(
    model: str | Path | PreTrainedModel = "demo",
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    output: str | Path | None = None,
    *,
    calib: str = "demo",
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
        if not resume:
            check_output(output, force)
    folder = find_model(str(model))
    find_family(read_config(folder), str(model))
    calibration = calibrate(folder, chosen, calib, samples, seq_len)
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


def calibrate(
    folder: Path, recipe: Recipe, calib: str, samples: int | None = None, seq_len: int | None = None
) -> Calibration:
    """Calibration windows for a recipe; none for one that needs no data."""
    if recipe.is_data_free:
        return Calibration(None, None)
    text = load_text(calib, "calibration")
    samples = recipe.calibration.samples if samples is None else samples
    seq_len = recipe.calibration.seq_len if seq_len is None else seq_len
    windows = token_windows(text, load_tokenizer(folder), seq_len, samples, True, start_token(read_config(folder)))
    description = {
        "text": text.name,
        "sha256": text.digest,
        "windows_asked": samples,
        "windows": len(windows),
        "seq_len": seq_len,
    }
    return Calibration(windows, description)


def evaluate(
    model: PreTrainedModel | str | Path,
    text: str | Sequence[str] = "demo",
    *,
    tokenizer: Any = None,
    windows: int | None = None,
    seq_len: int = 2048,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Perplexity]:
    """Perplexity on each text, by the text's name. A model that is passed itself needs its `tokenizer`."""
    model, tokenizer = _opened(model, tokenizer, device)
    if tokenizer is None:
        raise TypeError("evaluate needs the tokenizer of a model that is passed itself")
    batch = _batch_windows(model, seq_len)
    return {
        loaded.name: perplexity(
            model, token_windows(loaded, tokenizer, seq_len, windows, start=start_token(model.config)), batch, progress
        )
        for loaded in _texts(text)
    }


def diverge(
    model: PreTrainedModel | str | Path,
    original: PreTrainedModel | str | Path,
    text: str | Sequence[str] = "demo",
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
    original, tokenizer = _opened(original, tokenizer, device)
    model, tokenizer = _opened(model, tokenizer, device)
    if tokenizer is None:
        raise TypeError("diverge needs the tokenizer of models that are passed themselves")
    batch = _batch_windows(model, seq_len)
    results = {}
    for loaded in _texts(text):
        tokens = token_windows(loaded, tokenizer, seq_len, windows, start=start_token(model.config))
        results[loaded.name] = divergence(model, original, tokens, batch, progress)
    return results


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
        "model": WeightFiles(folder).fingerprint(),
        "dtype": str(model.dtype),
        "device": device_name(model.device),
        "versions": versions(tasks=True),
    }
    return Answers(path, owner, resume)


def _opened(model: PreTrainedModel | str | Path, tokenizer: Any, device: str | None) -> tuple[PreTrainedModel, Any]:
    """The model, opened where only its name is given, and a tokenizer: its own unless one is given."""
    if isinstance(model, PreTrainedModel):
        return model, tokenizer
    opened, folder = open_model(model, device)
    return opened, tokenizer or load_tokenizer(folder)


def _batch_windows(model: PreTrainedModel, seq_len: int) -> int:
    """Windows that pass through the model at once."""
    return max(1, EVALUATION_TOKENS.get(next(model.parameters()).device.type, 2048) // seq_len)


def _texts(text: str | Sequence[str]) -> list[Text]:
    """Evaluation texts; ConfigError if two have the same name."""
    found: dict[str, Text] = {}
    for spec in [text] if isinstance(text, str) else text:
        loaded = load_text(spec, "evaluation")
        if loaded.name in found:
            raise ConfigError(f"two texts are called {loaded.name!r}; name one as NAME=FILE")
        found[loaded.name] = loaded
    return list(found.values())


def generate_text(model: PreTrainedModel, tokenizer: Any, prompt: str, max_tokens: int = 40) -> str:
    """A greedy continuation of `prompt`, without the prompt."""
    device = next(model.parameters()).device
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    output = cast(Any, model).generate(
        **encoded, max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return str(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
