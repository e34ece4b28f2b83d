"""Quantize a model: one pass over its decoder blocks, with one block on the device at a time.

The inputs of a block come from the already quantized blocks before it. Within a block, sites are taken in the order of
computation: for each site, statistics are taken, the transform fitted, the weights rounded and the linears replaced
before the next site. Smoothing scales come first, from one pass over the block as it was, because they are folded into
layers that are rounded before the site they serve.

Finished blocks may be given to a store (on disk), which frees their memory. A store that already holds a block returns
it, with the same bits, and the block is not quantized again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration import ONE, Executor, World
from mxrot.calibration.executor import HELD
from mxrot.calibration.spreading import room_here
from mxrot.calibration.writing_sizes import WritingSizes
from mxrot.environment import check_device, device_name, versions
from mxrot.errors import ConfigError
from mxrot.failures import named_failures
from mxrot.heap import give_back
from mxrot.kernels.choices import kernel_choices
from mxrot.layers import build_apart
from mxrot.models import FolderSource, Source, read_generation_config
from mxrot.progress import Progress, part_of, silent
from mxrot.quantizing.batches import window_groups
from mxrot.quantizing.block import advance_original, finished_tensors, quantize_block
from mxrot.quantizing.choosing import choose, folds_of
from mxrot.quantizing.distilling import distill, learned_outside
from mxrot.quantizing.events import tell_of_block, watched
from mxrot.quantizing.head import in_place_of_weight, install_quantized_head, quantized_head
from mxrot.quantizing.loading import compute_dtype, load_finished_block, load_outer
from mxrot.quantizing.part import Beside, BlockRun
from mxrot.quantizing.permuting import find_orders, permuted_run
from mxrot.quantizing.problems import find_problems, memory_problem
from mxrot.quantizing.record import BlockReport, RunRecord, Trial
from mxrot.quantizing.rotating import config_after, drawn_rotations, rotated_source
from mxrot.quantizing.shared import check_alike, check_shared, own_executor
from mxrot.quantizing.spread_original import opened_original, spread_here
from mxrot.quantizing.store import BlockStore
from mxrot.quantizing.trained_rotations import learned_rotations
from mxrot.quantizing.written import Writing, by_the_first, manner_of
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme, install_attention, prepare
from mxrot.suited import suited
from mxrot.watching import Watch


@dataclass
class QuantizedModel:
    """The result of `quantize`."""

    model: PreTrainedModel | None
    """The model, ready to run; None if a store took the blocks."""
    record: RunRecord
    scheme: Scheme
    """The installed scheme."""
    source: Source
    """The quantized source: the given model after the rotations and permutations of the recipe."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of its weights."""
        return self.source.dtype


@torch.no_grad()
def quantize(
    source: Source | Path,
    recipe: Recipe,
    *,
    windows: Tensor | None = None,
    given: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    store: BlockStore | None = None,
    progress: Progress = silent,
    beside: Beside | None = None,
    world: World = ONE,
    watch: Watch | None = None,
) -> QuantizedModel:
    """Quantize a model, given by its source or its folder.

    Parts of the recipe that the model has no room for are left out (mxrot.suited), and the record says so. Rotations of
    the recipe are merged into the weights first. Everything else is read from the rotated model.

    `windows` are calibration token windows [W, T] (None for a recipe that needs no data). The first `given` are text
    and the others were written by the model; by default all are text. Computes on `device`, in the checkpoint's own
    type on a GPU and in float32 on a CPU. Everything that a checkpoint keeps is rounded to its type either way, so a
    reloaded model is the same model. `store` takes finished blocks. `beside` sees each site of a block that is
    quantized here, except those of experts that share one. The processes of `world` call this together, each with all
    windows, and share the work (side by side, each takes all windows). Only the first has the store and writes text,
    and all get the same model. `watch` is told of finished blocks, and may end the run with a TimeLimitError.

    Raises ConfigError and FamilyError before any weight is read, NumericsError with the layer's name.
    """
    started = time.monotonic()
    source = FolderSource(source) if isinstance(source, Path) else source
    recipe, left_out = suited(recipe, source.family, source.config)
    job = _checked(source, recipe, device, seed, store, progress, windows, world)
    if given is None:
        given = 0 if windows is None else len(windows)
    watch = watched(watch, job.run.world.peers, job.is_stored)
    job = replace(job, run=replace(job.run, beside=beside, watch=watch))
    job, rotation_losses = _rotated(job, windows)
    windows = _calibration_windows(job, windows)
    job, windows, trials = _chosen(job, source, windows, given)
    record = _new_record(recipe, job, windows)
    record.choice, record.rotation_losses, record.left_out_of_recipe = trials, rotation_losses, left_out
    run = job.run
    load_outer(job.model, run.family, run.source.outer(), run.dtype, run.device, carries=not job.is_stored)
    job = _permuted(job, windows, given)
    source = job.run.source
    streams = _first_streams(job, windows, given)
    _release_outer(job)
    for index, block in enumerate(job.blocks):
        report, is_new = _next_block(job, index, block, streams)
        record.blocks.append(report)
        if not recipe.tunes_network:
            _hand_over(job, index, block, report if is_new else None)
        tell_of_block(job.run, report, is_new, None if windows is None else windows.numel())
        give_back()
    if recipe.tunes_network:
        assert windows is not None
        streams = None  # frees memory
        give_back()
        record.tuning = distill(job.run, job.model, windows, given, job.store, progress)
        for index, block in enumerate(job.blocks):
            _hand_over(job, index, block, record.blocks[index])
    model = _finish(job, record)
    record.seconds = time.monotonic() - started
    if job.run.device.type == "cuda":
        record.peak_gpu_bytes = torch.cuda.max_memory_allocated(job.run.device)
    return QuantizedModel(model, record, job.run.scheme, source)


@dataclass(frozen=True)
class _Job:
    """The state of one call of `quantize`."""

    run: BlockRun
    model: PreTrainedModel
    """A skeleton at first. Blocks get their tensors in turn."""
    store: BlockStore | None
    """With several processes, only the first one has it."""
    progress: Progress
    is_stored: bool
    """True if there is a store, here or in the first process."""

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.run.family.blocks).children())


@dataclass(frozen=True)
class _Streams:
    """The inputs of the next block, in the quantized model and in the original."""

    executor: Executor
    original: Executor | None
    """None if the recipe does not use the original."""


def _checked(
    source: Source,
    recipe: Recipe,
    device: torch.device | str,
    seed: int,
    store: BlockStore | None,
    progress: Progress,
    windows: Tensor | None,
    world: World,
) -> _Job:
    """The checked job. Everything that can be refused is refused here, before any weight is read."""
    check_device(device)
    check_shared(recipe, None if windows is None else len(windows), world.size)
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = build_apart(source.config)
    for problem in find_problems(model, source.family, recipe, source.name, source):
        raise problem
    if windows is None and not recipe.is_data_free:
        raise ConfigError(f"recipe {recipe.name} needs calibration text")
    if windows is not None and not len(windows):
        _check_own_text(recipe)
    scheme = Scheme.of(recipe, source.family, model)
    changed = config_after(source.config, recipe)
    model = model if changed is source.config else build_apart(changed)
    dtype = compute_dtype(source.dtype, device)
    if recipe.runs_whole_original and not world.rank:  # the others hold no whole model
        shape = (0, recipe.calibration.seq_len) if windows is None else (windows.shape[0], windows.shape[1])
        writing = WritingSizes.of(model, source.family, recipe.calibration, shape, dtype)
        room = room_here(device, writing.on_one_device if recipe.writes_text else 0.0)
        too_large = memory_problem(recipe, writing, device, room)
        if too_large is not None:
            raise too_large
    install_attention(model, scheme, source.family)
    run = BlockRun(recipe, source, device, dtype, seed, scheme, world=world)
    return _Job(run, model, store, progress, world.peers.hand_out(store is not None))


def _check_own_text(recipe: Recipe) -> None:
    """Raise ConfigError if a recipe cannot use text that the model writes."""
    if not recipe.calibration.own:
        raise ConfigError(f"recipe {recipe.name} needs calibration text, and no window of it is given")
    if recipe.trains_rotations:
        raise ConfigError(
            f"recipe {recipe.name} trains rotations on text, before the model writes any; give a text with --calib, or "
            "set rotation.steps = 0"
        )


def _rotated(job: _Job, windows: Tensor | None) -> tuple[_Job, list[float] | None]:
    """The job with the recipe's rotations merged into its source, and the losses of their training, if trained."""
    run, losses = job.run, None
    rotations = drawn_rotations(run.config, run.recipe, run.seed, run.device)
    if run.recipe.trains_rotations:
        assert windows is not None
        training = learned_rotations(run, rotations, windows, job.store, job.progress)
        rotations, losses = training.rotations, training.losses
    return replace(
        job, run=replace(run, source=rotated_source(run.source, rotations, run.recipe.head is not None))
    ), losses


def _permuted(job: _Job, windows: Tensor | None, given: int) -> _Job:
    """The job with channels in the order of the recipe. A store keeps the orders until the run is done."""
    run = job.run
    if run.recipe.permutation is None:
        return job
    assert windows is not None
    checkpoint = None if job.store is None else job.store.orders_checkpoint
    orders = run.world.peers.hand_out(None if checkpoint is None else checkpoint.load())
    if orders is None:
        groups = window_groups(len(windows), given, run.recipe.calibration.held_out) or {}
        fitted = [places for name, places in groups.items() if not name.startswith(HELD)]
        executor = own_executor(run, job.model, windows[torch.cat(fitted)] if fitted else windows)
        orders = find_orders(run, job.blocks, executor, job.progress)
        if checkpoint is not None:
            checkpoint.save(orders)
        del executor
        give_back()
    return replace(job, run=permuted_run(run, orders))


def _calibration_windows(job: _Job, windows: Tensor | None) -> Tensor | None:
    """The given windows, followed by those that the original model writes, if the recipe asks for some."""
    run, choice = job.run, job.run.recipe.calibration
    if windows is None or not choice.writes:
        return windows

    def written() -> Tensor:
        manner = manner_of(choice, run.source.folder, choice.prompted)
        job.progress(0, 1, "opening the model that writes text to be calibrated on")
        sizes = WritingSizes.of(job.model, run.family, choice, (windows.shape[0], windows.shape[1]), run.dtype)
        with opened_original(run.source, run.dtype, run.device, spread_here(sizes, run.device)) as original:
            writing = Writing("calibration", choice.written(len(windows)), manner, run.seed)
            return writing.after(original, windows, len(windows), job.store, job.progress)

    found = by_the_first("calibration", written, job.store, run.world.peers)
    give_back()
    return found


def _chosen(
    job: _Job, source: Source, windows: Tensor | None, given: int
) -> tuple[_Job, Tensor | None, list[Trial] | None]:
    """The job with the candidates kept by its recipe's choice, the windows that it asks for, and the tried candidates.

    `source` is the model before rotations, which are merged again for each candidate.
    """
    run = job.run
    if run.recipe.choice is None or windows is None:
        return job, windows, None

    def quantized(tried: Recipe, windows: Tensor, given: int, progress: Progress) -> PreTrainedModel:
        options: dict[str, Any] = {"device": run.device, "seed": run.seed, "progress": progress}
        model = quantize(source, tried, windows=windows, given=given, **options).model
        assert model is not None
        return model

    folds = folds_of(windows, given, run.recipe)
    best, trials = choose(replace(run, source=source), folds, given, quantized, job.store, job.progress)
    return replace(job, run=replace(run, recipe=best)), windows[: given + best.calibration.written(given)], trials


def _new_record(recipe: Recipe, job: _Job, windows: Tensor | None) -> RunRecord:
    shape = None if windows is None else (windows.shape[0], windows.shape[1])
    device = job.run.device
    return RunRecord(recipe, job.run.seed, shape, device_name(device), versions(), kernel_choices(device))


def _first_streams(job: _Job, windows: Tensor | None, given: int) -> _Streams | None:
    """The inputs of the first block; None for a recipe that needs no data."""
    run = job.run
    if run.recipe.is_data_free:
        return None
    assert windows is not None
    groups = window_groups(len(windows), given, run.recipe.calibration.held_out)
    executor = own_executor(run, job.model, windows, groups)
    return _Streams(executor, executor.another() if run.recipe.looks_at_original else None)


def _release_outer(job: _Job) -> None:
    """Free embedding, last norm and head once no block needs them: a store takes those of the source."""
    run = job.run
    if job.is_stored and not run.recipe.tunes_network:
        for name in (run.family.embedding, run.family.final_norm, run.family.head):
            job.model.get_submodule(name).to("meta")
        give_back()


def _next_block(job: _Job, index: int, block: nn.Module, streams: _Streams | None) -> tuple[BlockReport, bool]:
    """Quantize a block, or take it from the store, and compute the inputs of the next. The bool is True if quantized
    here."""
    run, family = job.run, job.run.family
    told = part_of(job.progress, index, 1, len(job.blocks), "blocks")
    told(0, 1, family.block_prefix(index))
    kept = job.store.load(index) if job.store and not run.recipe.tunes_network else None
    finished = run.world.peers.hand_out(kept)
    run.source.prefetch(index + 1)
    executor, original = (None, None) if streams is None else (streams.executor, streams.original)
    with named_failures(family.block_prefix(index)):
        if finished is None:
            report = quantize_block(run, index, block, executor, original, told)
            check_alike(block, family.block_prefix(index), run.world.peers)
        else:
            tensors, report = finished
            if original is not None and not run.is_last(index):
                advance_original(run, index, block, executor, original)
            load_finished_block(block, index, tensors, run.scheme, family, run.dtype, run.device)
            if executor is not None:
                executor.begin(block)
        if executor is not None and run.is_last(index):
            executor.end()
        elif executor is not None:
            executor.advance(family.block_prefix(index))
    return report, finished is None


def _hand_over(job: _Job, index: int, block: nn.Module, report: BlockReport | None) -> None:
    """Give a block to the store, if there is one, and free it. Without a report the store already has it."""
    if not job.is_stored:
        return
    if job.store is not None and report is not None:
        job.store.save(index, finished_tensors(job.run, index, block), report)
    block.to("meta")


def _finish(job: _Job, record: RunRecord) -> PreTrainedModel | None:
    """The model, ready to run; None if a store has taken it. A quantized head is added to the record."""
    run, count = job.run, len(job.blocks)
    rest = run.source.outer() if job.store is not None or (run.scheme.head is not None and not job.is_stored) else {}
    head = quantized_head(run, rest) if rest else None
    record.head = None if head is None else head.report
    if not job.is_stored:
        if head is not None:
            install_quantized_head(run, job.model, head)
        read_generation_config(job.model, run.source.folder)
        if run.device.type == "cuda":
            prepare(job.model, run.scheme)
    elif job.store is not None:
        rest |= learned_outside(run, job.model)
        job.store.save_rest(rest if head is None else in_place_of_weight(run.family, rest, head))
    job.progress(count, count, "done")
    return None if job.is_stored else job.model
