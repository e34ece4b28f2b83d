"""The package's own functions: what the command line does, for Python.

mxrot.quantize("demo", "duquant++", output="out")
model = mxrot.load("out")
mxrot.evaluate(model, text="demo")
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch
from transformers import PreTrainedModel

from mxrot import quantizing
from mxrot.calibration import World
from mxrot.checkpoint import check_exportable, check_output, hash_model, quantize_to_folder, with_config
from mxrot.checkpoint import load as load_checkpoint
from mxrot.environment import device_name, versions
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
from mxrot.kernels.choices import kernel_choices
from mxrot.layers.cache_size import cache_of
from mxrot.models import find_model
from mxrot.opening import base_name, check_original, default_device, is_verifiable, load_tokenizer, open_model, opened
from mxrot.planning import needed_on_disk
from mxrot.progress import Progress
from mxrot.progress.display import ProgressOption, shown_progress
from mxrot.prompting import generate_text
from mxrot.quantizing.shared import check_shared
from mxrot.ranks import current, joined
from mxrot.recipe import Recipe, load_recipe
from mxrot.shell import expanded
from mxrot.text import Windows, load_texts
from mxrot.tokenizing import calibrate, need_tokenizer, read_texts, texts_or_windows
from mxrot.watching import Watch

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "base_name",
    "batch_windows",
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


class QuantizeOptions(TypedDict, total=False):
    """What `quantize` takes by name."""

    calib: Any
    samples: int | None
    seq_len: int | None
    seed: int
    device: str | None
    force: bool
    resume: bool
    tokenizer: Any
    progress: ProgressOption
    watch: Watch | None


Source = str | Path | PreTrainedModel
AnyRecipe = str | Path | Recipe


@overload
def quantize(
    model: Source = ..., recipe: AnyRecipe = ..., output: None = None, **options: Unpack[QuantizeOptions]
) -> PreTrainedModel: ...


@overload
def quantize(
    model: Source, recipe: AnyRecipe, output: str | Path, **options: Unpack[QuantizeOptions]
) -> dict[str, Any]: ...


@overload
def quantize(
    model: Source = ..., recipe: AnyRecipe = ..., *, output: str | Path, **options: Unpack[QuantizeOptions]
) -> dict[str, Any]: ...


def quantize(
    model: Source = "demo",
    recipe: AnyRecipe = DEFAULT_RECIPE,
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
    progress: ProgressOption = None,
    watch: Watch | None = None,
) -> PreTrainedModel | dict[str, Any]:
    """Quantize a model by its hub id, folder, or `demo`; or one that is loaded, which stays as it is.

    With `output` a checkpoint folder is written and the contents of its run.json come back; without it the
    quantized model, ready to run on `device`, with `generate` and `save_pretrained`. A loaded model needs its
    `tokenizer`, unless there is no text to tokenize, and is written to a temporary folder first.
    `calib` is a text, or several, as docs/text.md lists them: names, rows, token ids, tensors, data sets.
    `samples` and `seq_len` replace the recipe's calibration windows.
    `progress` is a function to be told how far it is, or True to show it on standard error; it is shown in a notebook
    and at Python's prompt, too, unless it is False. `watch` hears of finished blocks and may end a run (docs/scale.md).
    Errors are those of mxrot.errors, raised before any weight is read where that is possible.
    In processes that torchrun has started all call this, and share the work (docs/scale.md).
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if isinstance(model, PreTrainedModel) and tokenizer is None and not chosen.is_data_free:
        calib = load_texts(calib, "calibration")
        if need_tokenizer(calib):
            raise TypeError("quantize needs the tokenizer of a model that is passed itself")
    texts: dict[str, Any] = {"calib": calib, "samples": samples, "seq_len": seq_len}
    own = model.device if isinstance(model, PreTrainedModel) else torch.device(default_device())
    with (
        joined(device or own.type) as world,
        shown_progress(False if world.rank else progress, f"Quantizing with {chosen.name}") as told,
    ):
        device = str(world.device or device or own)
        options: dict[str, Any] = {"force": force, "resume": resume, "seed": seed, "world": world, "watch": watch}
        if not isinstance(model, PreTrainedModel):
            return _quantize(str(model), chosen, output, device, told, **texts, **options)
        with tempfile.TemporaryDirectory(prefix="mxrot-") as saved:
            named = Path(saved) / (Path(model.name_or_path or "").name or type(model).__name__)
            model.save_pretrained(named)
            if tokenizer is not None:
                tokenizer.save_pretrained(named)
            return _quantize(str(named), chosen, output, device, told, **texts, **options)


def _quantize(
    model: str,
    recipe: Recipe,
    output: str | Path | None,
    device: str,
    progress: Progress,
    *,
    calib: Any,
    samples: int | None,
    seq_len: int | None,
    seed: int,
    force: bool,
    resume: bool,
    world: World,
    watch: Watch | None,
) -> PreTrainedModel | dict[str, Any]:
    """The same for a model by its name."""
    check_shared(recipe, None, world.size)
    if output is not None:
        output = expanded(output)
        check_exportable(recipe)
        if not world.rank:
            check_output(output, force or resume)
    with world.first_goes_ahead():
        loaded = None if recipe.is_data_free else load_texts(calib, "calibration")
        folder = find_model(model)
    check_original(folder, model)
    calibration = calibrate(folder, recipe, loaded, samples, seq_len, progress)
    recipe, windows = calibration.recipe, world.hand_out(calibration.windows)
    options: dict[str, Any] = {"windows": windows, "device": device, "seed": seed, "progress": progress, "world": world}
    options["watch"] = watch
    if output is None:
        result = quantizing.quantize(folder, recipe, **options)
        assert result.model is not None
        return with_config(result.model, recipe)
    return quantize_to_folder(
        folder,
        recipe,
        output,
        base_name=base_name(model, folder),
        data=calibration.description,
        force=force,
        resume=resume,
        needed_bytes=needed_on_disk(folder, recipe, (0, 0) if windows is None else (len(windows), windows.shape[1])),
        **options,
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
    progress: ProgressOption = None,
) -> dict[str, Perplexity]:
    """Perplexity on each text, by the text's name. A model that is passed itself needs its `tokenizer`.

    `text` is a text, or several, as docs/text.md lists them. Windows that are given as such keep their own length.
    """
    with shown_progress(progress, "Evaluating") as told:
        read = read_texts(model, text, tokenizer=tokenizer, windows=windows, seq_len=seq_len, progress=told)
        model = opened(model, device, told)
        return {
            part.text.name: perplexity(model, part.ids, batch_windows(model.device, part), told, world=current())
            for part in read
        }


def diverge(
    model: PreTrainedModel | str | Path,
    original: PreTrainedModel | str | Path,
    text: Any = "demo",
    *,
    tokenizer: Any = None,
    windows: int | None = None,
    seq_len: int = 2048,
    device: str | None = None,
    progress: ProgressOption = None,
) -> dict[str, Divergence]:
    """How far `model` is from `original` on each text, by the text's name; both are on the device at once.

    Models that are passed themselves need their `tokenizer`.
    """
    with shown_progress(progress, "Evaluating") as told:
        texts = texts_or_windows(text)
        if tokenizer is None and need_tokenizer(texts) and not isinstance(original, PreTrainedModel):
            tokenizer = load_tokenizer(find_model(str(original)))
        read = read_texts(model, texts, tokenizer=tokenizer, windows=windows, seq_len=seq_len, progress=told)
        original, model = opened(original, device, told), opened(model, device, told)
        return {
            part.text.name: divergence(
                model, original, part.ids, batch_windows(model.device, part), told, world=current()
            )
            for part in read
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
    progress: ProgressOption = None,
) -> dict[str, TaskScore]:
    """Scores in tasks of lm-eval, by their names; needs `pip install 'mxrot[tasks]'`.

    The tasks' data are those of the hub, or of the folder `data`; `limit` takes the first examples of each. A model
    that is passed itself needs its `tokenizer`.
    """
    with shown_progress(progress, "Evaluating") as told:
        loaded = load_tasks([tasks] if isinstance(tasks, str) else tasks, None if data is None else Path(data))
        if tokenizer is None:
            if isinstance(model, PreTrainedModel):
                raise TypeError("evaluate_tasks needs the tokenizer of a model that is passed itself")
            tokenizer = load_tokenizer(find_model(str(model)))
        model = opened(model, device, told)
        return score_tasks(model, tokenizer, loaded, limit=limit, batch_size=batch_size, progress=told, world=current())


def kept_answers(path: Path, model: PreTrainedModel, folder: Path, resume: bool = False) -> Answers:
    """Answers to tasks in a file, for the model opened from `folder`.

    With `resume` those that the file has; ConfigError if they were given by another model, device or version.
    """
    owner: dict[str, Any] = {
        "model": hash_model(folder)[0],
        "dtype": str(model.dtype),
        "device": device_name(model.device),
        "kernels": kernel_choices(model.device),
        "versions": versions(tasks=True),
    }
    if (cache := cache_of(model)) is not None:
        owner["cache"] = cache.spelled
    return Answers(path, owner, resume)


def batch_windows(device: torch.device, windows: Windows) -> int:
    """Windows that pass through a model at once on that device."""
    return max(1, EVALUATION_TOKENS.get(device.type, 2048) // windows.ids.shape[1])
