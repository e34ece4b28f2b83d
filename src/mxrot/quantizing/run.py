"""Quantize a model: one pass over its decoder blocks, one block on the device at a time.

The inputs of a block come from the already quantized blocks before it. Within a block the sites are taken in
the order in which they compute: a site's statistics are taken, its transform fitted, its weights rounded and its
linears replaced before the next site is looked at. Smoothing scales come first, from one pass over the block as
it was, because they must go into layers that will be rounded before the site they serve.

Finished blocks may be handed to a store (on disk), which releases them; a store that already holds a block gives
it back instead of having it quantized again, with the same bits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration import first_executor, generated_windows
from mxrot.environment import check_device, device_name, versions
from mxrot.errors import ConfigError
from mxrot.failures import named_failures
from mxrot.heap import give_back
from mxrot.kernels.choices import kernel_choices
from mxrot.layers import build_apart, score_heads
from mxrot.models import FolderSource, Source, read_generation_config
from mxrot.progress import Progress, part_of, silent
from mxrot.quantizing.block import advance_original, finished_tensors, quantize_block
from mxrot.quantizing.loading import compute_dtype, load_finished_block, load_original, load_outer
from mxrot.quantizing.part import BlockRun
from mxrot.quantizing.problems import find_problems, free_memory, memory_problem
from mxrot.quantizing.record import BlockReport, RunRecord
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme, prepare
from mxrot.transforms import generator_for
from mxrot.tuning import Check, TuningCheckpoint, tune_network

BATCH_TOKENS = {"cpu": 2048, "cuda": 131072}
"""Tokens that pass through a block at once, at most; fixed, so that sums always run in the same order."""
BATCH_ELEMENTS = 1 << 28
"""Bounds tokens times the widest activation, so that a large model's temporaries stay near a gigabyte each."""


class BlockStore(Protocol):
    """Takes finished blocks, and gives them back in a resumed run."""

    def load(self, index: int) -> tuple[dict[str, Tensor], BlockReport] | None:
        """Tensors by their names in the block, and its report; None if the store does not hold it."""

    def save(self, index: int, tensors: dict[str, Tensor], report: BlockReport) -> None:
        """Keep a finished block."""

    def save_rest(self, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors outside of the decoder blocks, by their full names."""

    @property
    def tuning_checkpoint(self) -> TuningCheckpoint:
        """Keeps tuning of the whole network until it is done."""

    def load_windows(self, purpose: str) -> Tensor | None:
        """Windows that `save_windows` was given for it, given and written ones, or None."""

    def save_windows(self, purpose: str, windows: Tensor) -> None:
        """Keep the text that was written for calibration, or for tuning."""


@dataclass
class QuantizedModel:
    """The result of `quantize`."""

    model: PreTrainedModel | None
    """Ready to run; None where a store took the blocks."""
    record: RunRecord
    scheme: Scheme
    """What is installed."""
    dtype: torch.dtype
    """The type of most weights of the model that was quantized."""


@torch.no_grad()
def quantize(
    source: Source | Path,
    recipe: Recipe,
    *,
    windows: Tensor | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    store: BlockStore | None = None,
    progress: Progress = silent,
) -> QuantizedModel:
    """Quantize a model, by its source or its folder.

    `windows` are calibration token windows [W, T] (None for a recipe that needs no data). Computes on `device`,
    in the checkpoint's own type on a GPU and in float32 on a CPU; everything a checkpoint keeps is rounded to its
    type either way, so that a reloaded model is the same model. With a `store`, finished blocks go there.

    Raises ConfigError and FamilyError before any weight is read, NumericsError with the layer's name.
    """
    started = time.monotonic()
    check_device(device)
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if isinstance(source, Path):
        source = FolderSource(source)
    family = source.family
    model = build_apart(source.config)
    for problem in find_problems(model, family, recipe, source.name, source):
        raise problem
    if windows is None and not recipe.is_data_free:
        raise ConfigError(f"recipe {recipe.name} needs calibration text")

    scheme = Scheme.of(recipe, family, model)
    run = BlockRun(recipe, source, device, compute_dtype(source.dtype, device), seed, scheme)
    given = 0 if windows is None else len(windows)
    too_large = memory_problem(model, recipe, run.dtype, device, free_memory(device))
    if too_large is not None:
        raise too_large
    if windows is not None and recipe.calibration.generated:
        written = store.load_windows("calibration") if store else None
        if written is None:
            progress(0, 1, "opening the model that writes text to be calibrated on")
            writer = load_original(source, run.dtype, device)
            each = recipe.calibration.generated
            written = with_generated(writer, windows, given, each, seed, "calibration", progress=progress)
            del writer
            give_back()
            if store is not None:
                store.save_windows("calibration", written)
        windows = written
    shape = None if windows is None else (windows.shape[0], windows.shape[1])
    record = RunRecord(recipe, seed, shape, device_name(device), versions(), kernel_choices(device))

    load_outer(model, family, source.outer(), run.dtype, device)
    executor = original = None
    if not recipe.is_data_free:
        assert windows is not None
        batch_windows = _windows_at_once(model, device, windows.shape[1])
        executor = first_executor(model, family, windows, batch_windows, run.world)
        if recipe.looks_at_original:
            original = executor.another()
    blocks = list(model.get_submodule(family.blocks).children())
    for index, block in enumerate(blocks):
        told = part_of(progress, index, 1, len(blocks))
        told(0, 1, family.block_prefix(index))
        finished = store.load(index) if store and not recipe.tunes_network else None
        source.prefetch(index + 1)
        with named_failures(family.block_prefix(index)):
            if finished is None:
                report = quantize_block(run, index, block, executor, original, told)
            else:
                tensors, report = finished
                if original is not None and not run.is_last(index):
                    advance_original(run, index, block, original)
                load_finished_block(block, index, tensors, scheme, family, run.dtype, device)
                if executor is not None:
                    executor.begin(block)
            record.blocks.append(report)
            if executor is not None and run.is_last(index):
                executor.end()
            elif executor is not None:
                executor.advance(family.block_prefix(index))
        if store is not None and not recipe.tunes_network:
            if finished is None:
                store.save(index, finished_tensors(run, index, block), report)
            block.to("meta")
        give_back()
    if recipe.tunes_network:
        assert windows is not None
        executor = original = None  # their memory
        give_back()
        record.tuning = _tune_network(run, model, windows, given, store, progress)
        if store is not None:
            for index, block in enumerate(blocks):
                store.save(index, finished_tensors(run, index, block), record.blocks[index])
                block.to("meta")
    if store is None:
        read_generation_config(model, source.folder)
        if device.type == "cuda":
            prepare(model, scheme)
    else:
        store.save_rest(source.outer())
    progress(len(blocks), len(blocks), "done")
    record.seconds = time.monotonic() - started
    if device.type == "cuda":
        record.peak_gpu_bytes = torch.cuda.max_memory_allocated(device)
    return QuantizedModel(None if store else model, record, scheme, source.dtype)


def _tune_network(
    run: BlockRun,
    model: PreTrainedModel,
    windows: Tensor,
    given: int,
    store: BlockStore | None,
    progress: Progress,
) -> list[Check]:
    """Distill the original model into the quantized one; the losses. `given` of the windows came from the text."""
    options = run.recipe.tuning
    assert options is not None
    progress(0, 1, "opening the original model")
    original = load_original(run.source, run.dtype, run.device)
    if options.generated:
        written = store.load_windows("tuning") if store else None
        if written is None:
            each, prompted = options.generated, options.prompted
            written = with_generated(original, windows, given, each, run.seed, "tuning", prompted, progress)
            if store is not None:
                store.save_windows("tuning", written)
        windows = written
    generator = generator_for(run.seed, "tuning")
    tuning_checkpoint = None if store is None else store.tuning_checkpoint
    return tune_network(
        model, original, run.family, windows, given, options, generator, run.active_sites, tuning_checkpoint, progress
    )


def with_generated(
    original: PreTrainedModel,
    windows: Tensor,
    given: int,
    each: float,
    seed: int,
    purpose: str,
    prompted: float = 0.0,
    progress: Progress = silent,
) -> Tensor:
    """`windows` [W, T], and after them what `original` writes: `each` windows for every one of the `given`.

    A share `prompted` of what is written goes on from pieces of the text, which is the first `given` windows.
    """
    generator = generator_for(seed, f"windows for {purpose}")
    count = windows_to_write(each, given)
    written = generated_windows(original, count, windows.shape[1], generator, windows[:given], prompted, progress)
    return torch.cat([windows, written])


def windows_to_write(each: float, given: int) -> int:
    """How many windows the original model writes: `each` for every one of the `given`."""
    return max(1, round(each * given))


def _windows_at_once(model: PreTrainedModel, device: torch.device, seq_len: int) -> int:
    """How many calibration windows pass through a block together."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inner = [module for module in linears if module is not model.get_output_embeddings()]
    widest = max(max(linear.in_features, linear.out_features) for linear in inner)
    return max(1, tokens_at_once(max(widest, score_heads(model) * seq_len), device.type) // seq_len)


def tokens_at_once(widest: int, device_type: str) -> int:
    """The same in tokens, where a block makes so many numbers of a token at most, before it goes on."""
    return min(BATCH_TOKENS.get(device_type, BATCH_TOKENS["cpu"]), BATCH_ELEMENTS // widest)
