"""Distill the original model into a completely quantized one: the stages, and the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.progress import Progress
from mxrot.quantizing.loading import load_original
from mxrot.quantizing.part import BlockRun
from mxrot.quantizing.shared import check_alike
from mxrot.quantizing.store import BlockStore
from mxrot.quantizing.written import Writing, by_the_first, manner_of
from mxrot.transforms import generator_for
from mxrot.tuning import Check, gains_of, tune_network


def distill(
    run: BlockRun,
    model: PreTrainedModel,
    windows: Tensor,
    given: int,
    store: BlockStore | None,
    progress: Progress,
) -> list[Check]:
    """Tune `model`, quantized and on its device, towards the original. Returns the losses.

    The first `given` of the windows [W, T] are text. Every process holds both models, and takes a part of each batch.
    """
    options = run.recipe.tuning
    assert options is not None
    progress(0, 1, "opening the original model")
    original = load_original(run.source, run.dtype, run.device)
    windows = _windows_to_tune_on(run, {"tuning": original, "rollouts": model}, windows, given, store, progress)
    checks: list[Check] = []
    stages = [("tuning", options, None if store is None else store.tuning_checkpoint)]
    if options.light_steps:
        stages.insert(0, ("light steps", options.light, None if store is None else store.light_checkpoint))
    if options.polish_steps:
        stages.append(("polish", options.polish, None if store is None else store.polish_checkpoint))
    for purpose, own, checkpoint in stages:
        generator = generator_for(run.seed, purpose)
        found = tune_network(
            model,
            original,
            run.family,
            windows,
            given,
            own,
            generator,
            run.active_sites,
            run.rounding_type,
            checkpoint,
            progress,
            run.watch,
            run.world,
        )
        before = checks[-1].step if checks else 0
        checks += [replace(check, step=before + check.step) for check in found]
    blocks = list(model.get_submodule(run.family.blocks).children())
    if options.moves == "levels" and options.norm_rate:
        _round_gains(run, blocks)
    for index, block in enumerate(blocks):
        check_alike(block, run.family.block_prefix(index), run.world)
    check_alike(model.get_submodule(run.family.final_norm), run.family.final_norm, run.world)
    return checks


def _windows_to_tune_on(
    run: BlockRun,
    writers: dict[str, PreTrainedModel],
    windows: Tensor,
    given: int,
    store: BlockStore | None,
    progress: Progress,
) -> Tensor:
    """The calibration windows, followed by what the models write for each purpose, if the recipe asks for it."""
    options, calibration = run.recipe.tuning, run.recipe.calibration
    assert options is not None
    for purpose, each in (("tuning", options.generated), ("rollouts", options.rollouts)):
        if each:
            manner = manner_of(calibration, run.source.folder, options.prompted)
            writing = Writing(purpose, max(1, round(each * (given + calibration.own))), manner, run.seed)
            write = partial(writing.after, writers[purpose], windows, given, store, progress)
            windows = by_the_first(purpose, write, store, run.world)
    return windows


def _round_gains(run: BlockRun, blocks: Sequence[nn.Module]) -> None:
    """Round the gains of norms to their own type, the only values a checkpoint can keep."""
    for index, block in enumerate(blocks):
        prefix = run.family.block_prefix(index)
        for name, gain in gains_of(block).items():
            gain.data.copy_(gain.data.to(run.rounding_type(f"{prefix}.{name}")))


def learned_outside(run: BlockRun, model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors outside of the decoder blocks that tuning has changed: the gain of the last norm."""
    options = run.recipe.tuning
    if options is None or options.scope != "network" or options.moves == "levels" or not options.norm_rate:
        return {}
    name = f"{run.family.final_norm}.weight"
    return {name: model.get_parameter(name).data.to(run.rounding_type(name))}
