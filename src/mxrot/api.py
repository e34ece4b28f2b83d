"""The functions of the package. They do in Python what the commands do.

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
"""Tokens in one batch of an evaluation, by device."""


class QuantizeOptions(TypedDict, total=False):
    """The keyword arguments of `quantize`."""

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

    Under torchrun each process calls this function, and all of them share the work (docs/scale.md).

    Args:
        model: A hub id, a folder, `demo`, or a loaded model. A loaded model is not changed; it is written to a
            temporary folder first.
        recipe: The name of a recipe, a TOML file, or a Recipe.
        output: The folder to write. If it is None, nothing is written.
        calib: One or more calibration texts (docs/text.md): names, rows, token ids, tensors or data sets.
        samples: The number of calibration windows. None takes the recipe's.
        seq_len: Tokens in a window. None takes the recipe's.
        seed: The seed of all random numbers.
        device: The device to compute on. None takes the device of a loaded model, otherwise the GPU if there is one.
        force: Replace an output folder that is not empty.
        resume: Keep the finished blocks of an earlier run, and continue from there.
        family: "auto" derives from the model's class which linears read the same input, and what can be merged where
            (docs/add-a-family.md). None uses the record of the architecture.
        tokenizer: The tokenizer of a loaded model. It is needed only if there is text to tokenize.
        progress: True shows progress on standard error, and False shows none. A function is called with
            (done, total, what). None shows progress in a notebook and at Python's prompt.
        watch: Is told of each finished block, and can end the run (docs/scale.md).

    Returns:
        With `output`, the contents of its run.json. Without it, the quantized model on `device`: an ordinary
        transformers model with `generate` and `save_pretrained`.

    Raises:
        MxrotError: A recipe, model, text or folder is wrong. If possible, this is raised before any weight is read.
        TypeError: A loaded model was passed with text to tokenize, but without its tokenizer.

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
    """`quantize` for a model that is given by name."""
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

    The tensors of the model are ordinary ones even if this is called inside `torch.inference_mode`: PyTorch counts
    their changes.

    Args:
        folder: A folder that `quantize` has written.
        device: The device to load to. None takes the GPU if there is one.
        dtype: The type to compute in, such as torch.bfloat16. None takes the type of the checkpoint.
        verify: Compare the SHA-256 of each file first. None does so if the weights take at most 1 GB.
        keeps_fp8: Keep weights in FP8 where FP8 products are faster. They then take twice the memory.

    Returns:
        A transformers model in evaluation mode.

    Raises:
        CheckpointError: The folder is not a checkpoint.
        DamagedError: A file does not hold what was written.

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
    """Measure the perplexity of a model on one or more texts.

    Args:
        model: The folder of a checkpoint, an original model by name, or a loaded model.
        text: One or more texts (docs/text.md). Windows of token ids keep their own length.
        tokenizer: The tokenizer of a loaded model.
        windows: The most windows of each text. None takes all.
        seq_len: Tokens in a window. Windows do not overlap.
        device: The device to compute on. None takes the GPU if there is one.
        progress: See `quantize`.

    Returns:
        One Perplexity for each text, by its name: `ppl`, `nll` (nats per token), `windows`, `tokens` (the scored ones)
        and `seq_len`. The mean over windows is taken in float64.

    Raises:
        MxrotError: The model or a text cannot be read, or a text fills no window.

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
    """Measure how far a quantized model is from its original, token by token.

    The device holds both models at the same time.

    Args:
        model: The folder of a checkpoint, or a loaded model.
        original: The model that it was made from, by name or loaded.
        text: One or more texts (docs/text.md).
        tokenizer: The tokenizer of loaded models.
        windows: The most windows of each text. None takes all.
        seq_len: Tokens in a window.
        device: The device to compute on. None takes the GPU if there is one.
        progress: See `quantize`.

    Returns:
        One Divergence for each text, by its name: `kl` (nats per token), `agreement` (the share of positions where both
        models prefer the same token), `ppl`, `original_ppl` and `ppl_difference`. KL, agreement and the difference have
        standard errors over windows.

    Raises:
        ConfigError: The two models have different vocabularies.

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
    """Score a model in tasks of lm-evaluation-harness.

    This needs the package lm-eval (`pip install 'mxrot[tasks]'`).

    Args:
        model: The folder of a checkpoint, an original model by name, or a loaded model.
        tasks: One name of a task, or several.
        tokenizer: The tokenizer of a loaded model.
        data: A folder with the data of the tasks (docs/tasks.md). None takes the data from the hub.
        limit: Use only this many examples of each task, the first ones.
        batch_size: Requests in a batch. None chooses by device.
        device: The device to compute on. None takes the GPU if there is one.
        progress: See `quantize`.

    Returns:
        One TaskScore for each task, by its name, with all metrics and their standard errors.

    Raises:
        ConfigError: There is no such task, or mxrot cannot score it.
        TypeError: A loaded model was passed without its tokenizer.

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
    """The file that keeps a model's answers to tasks.

    With `resume`, the answers in the file are used. ConfigError if they come from another model, device or version.
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
    """The number of windows in one batch of an evaluation on this device."""
    return max(1, EVALUATION_TOKENS.get(device.type, 2048) // windows.ids.shape[1])
