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
from mxrot.checkpoint.named_file import write_named
from mxrot.deriving import asked_family, check_asked, record_file, record_text
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
    family: str | None
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
    family: str | None = None,
    tokenizer: Any = None,
    progress: ProgressOption = None,
    watch: Watch | None = None,
) -> PreTrainedModel | dict[str, Any]:
    """Quantize a model, into a checkpoint folder or in memory.

    In processes that torchrun has started all call this, and share the work (docs/scale.md).

    Args:
        model: A hub id, a folder, `demo`, or a loaded model, which stays as it is and is written to a temporary folder
            first.
        recipe: The name of a recipe, a TOML file, or a Recipe.
        output: The folder to write. Without it nothing is written.
        calib: Calibration text, or several, as docs/text.md lists them: names, rows, token ids, tensors, data sets.
        samples: Calibration windows, in place of the recipe's number.
        seq_len: Tokens a window, in place of the recipe's number.
        seed: The seed of everything that is drawn.
        device: Where to compute; by default the GPU if there is one, or the device of a loaded model.
        force: Replace an output folder that is not empty.
        resume: Keep the finished blocks of an earlier run, and go on there.
        family: "auto" derives which linears read one input, and what may be merged where, from the model's own class
            (docs/add-a-family.md). By default the record of its architecture says it.
        tokenizer: That of a loaded model. Not needed where there is no text to tokenize.
        progress: True shows progress on standard error, False is silent, a function is told (done, total, what). None
            shows it in a notebook and at Python's prompt.
        watch: Hears of finished blocks, and may end a run (docs/scale.md).

    Returns:
        With `output` the contents of its run.json. Without it the quantized model on `device`, with `generate` and
        `save_pretrained`.

    Raises:
        MxrotError: Wrong recipes, models, texts and folders, before any weight is read where that is possible.

    Example:
        >>> run = mxrot.quantize("demo", "hadamard", output="smollm2-hadamard")
        >>> run["size"]["bits_per_weight"]
        4.25
        >>> model = mxrot.quantize("demo", "rtn")  # in memory
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
        options["family"] = family
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
    family: str | None,
) -> PreTrainedModel | dict[str, Any]:
    """The same for a model by its name."""
    check_shared(recipe, None, world.size)
    check_asked(family)
    if output is not None:
        output = expanded(output)
        check_exportable(recipe)
        if not world.rank:
            check_output(output, force or resume)
    with world.first_goes_ahead():
        loaded = None if recipe.is_data_free else load_texts(calib, "calibration")
        folder = find_model(model)
    with asked_family(family, folder, model) as found:
        if found is not None and output is not None and not world.rank:
            write_named(record_file(output), record_text(found).encode())
        check_original(folder, model)
        calibration = calibrate(folder, recipe, loaded, samples, seq_len, progress)
        recipe, windows = calibration.recipe, world.hand_out(calibration.windows)
        options: dict[str, Any] = {"windows": windows, "device": device, "seed": seed, "progress": progress}
        options |= {"world": world, "watch": watch}
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
            needed_bytes=needed_on_disk(folder, recipe, (0, 0) if windows is None else (*windows.shape,)),
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
    """Load the quantized model of a checkpoint folder.

    Also inside `torch.inference_mode` its tensors are ordinary ones, which know when they were changed.

    Args:
        folder: What `quantize` has written.
        device: Where to; by default the GPU if there is one.
        dtype: The type that it computes in; by default that of the checkpoint.
        verify: Compare the SHA-256 of every file first. None does so up to 1 GB of weights.
        keeps_fp8: Hold weights in FP8 where products of them are faster. They take twice the memory.

    Returns:
        A transformers model in evaluation mode.

    Raises:
        CheckpointError: The folder is no checkpoint. DamagedError: a file is not what was written.

    Example:
        >>> model = mxrot.load("smollm2-hadamard")
        >>> tokenizer = transformers.AutoTokenizer.from_pretrained("smollm2-hadamard")
        >>> ids = tokenizer("The three primary colors are", return_tensors="pt").to(model.device)
        >>> text = tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0])
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
    """Measure perplexity.

    Args:
        model: A checkpoint, an original, or a loaded model.
        text: A text, or several, as docs/text.md lists them. Windows that are given as such keep their own length.
        tokenizer: That of a loaded model.
        windows: Windows of each text at most; by default all.
        seq_len: Tokens a window. Windows do not overlap.
        device: Where to compute, by default the GPU if there is one.
        progress: As for `quantize`.

    Returns:
        By the name of the text a Perplexity: `ppl`, `nll` in nats a token, `windows`, `tokens`, `seq_len`.

    Example:
        >>> found = mxrot.evaluate("smollm2-hadamard", text="demo", windows=2, seq_len=512)
        >>> found["demo"].tokens  # every token of a window but its first is scored
        1022
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
    """Measure how far a quantized model is from the original, token by token.

    Both models are on the device at once.

    Args:
        model: A checkpoint or a loaded model.
        original: What it was made from.
        text: A text, or several, as docs/text.md lists them.
        tokenizer: That of loaded models.
        windows: Windows of each text at most; by default all.
        seq_len: Tokens a window.
        device: Where to compute, by default the GPU if there is one.
        progress: As for `quantize`.

    Returns:
        By the name of the text a Divergence: `kl` in nats a token, `agreement` of the top token, both perplexities and
        their difference, each with its standard error over windows.

    Raises:
        ConfigError: The two have different vocabularies.

    Example:
        >>> found = mxrot.diverge("smollm2-hadamard", "demo", windows=2, seq_len=512)
        >>> found["demo"].kl > 0
        True
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
    """Score a model in tasks of lm-evaluation-harness; needs `pip install 'mxrot[tasks]'`.

    Args:
        model: A checkpoint, an original, or a loaded model.
        tasks: Names of tasks.
        tokenizer: That of a loaded model.
        data: A folder with the data of the tasks (docs/tasks.md); by default they come from the hub.
        limit: Only the first examples of each task.
        batch_size: Requests that pass through the model at once.
        device: Where to compute, by default the GPU if there is one.
        progress: As for `quantize`.

    Returns:
        By the name of the task a TaskScore: its metrics, each with its standard error.

    Example:
        >>> scores = mxrot.evaluate_tasks("smollm2-hadamard", ["piqa"], limit=100)  # doctest: +SKIP
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
