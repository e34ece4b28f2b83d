"""Rotations trained before a model is quantized, on its calibration text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.heap import give_back
from mxrot.progress import Progress, silent
from mxrot.quantizing.loading import load_original
from mxrot.quantizing.part import BlockRun
from mxrot.quantizing.store import BlockStore
from mxrot.rules import Rules
from mxrot.scheme import install_attention
from mxrot.surgery import Rotations
from mxrot.transforms import generator_for
from mxrot.tuning import RotatedNetwork, RotationTraining, train_rotations, trained_sites


def training_problems(rules: Rules) -> Iterator[ConfigError]:
    """The reasons why this recipe cannot train rotations; none if it trains none."""
    recipe = rules.recipe
    if recipe.rotation is None or not recipe.trains_rotations:
        return
    start = f"recipe {recipe.name}: rotation.steps = {recipe.rotation.steps}"
    if recipe.smoothing is not None:
        yield ConfigError(
            f"{start}: training cannot know the smoothing scales, which follow it; take out [smoothing], or set "
            "rotation.steps = 0"
        )
    fitted = next((one.transform for one in rules.in_use if one.transform.needs), None)
    if fitted is not None:
        yield ConfigError(
            f"{start}: training cannot know transform {fitted.name!r}, which is fitted to the rotated model; take one "
            "that needs no data, such as hadamard, or set rotation.steps = 0"
        )
    if not recipe.rotation.quantized_weights and all(one.activations is None for one in rules.in_use):
        yield ConfigError(
            f"{start}: nothing is quantized that training could see; set rotation.quantized_weights = true, or "
            "rotation.steps = 0"
        )


def learned_rotations(
    run: BlockRun, start: Rotations, windows: Tensor, store: BlockStore | None = None, progress: Progress = silent
) -> RotationTraining:
    """Rotations trained from `start` on token windows [W, T], by the recipe of a `run` whose source is not yet rotated.

    The whole original model is on the device meanwhile. A store keeps an unfinished training, and a finished one until
    the run is done.
    """
    options = run.recipe.rotation
    assert options is not None
    checkpoint = None if store is None else store.rotation_checkpoint
    training = RotationTraining.begin(start, run.device, checkpoint)
    if len(training.losses) >= options.steps:
        return training
    progress(0, 1, "opening the original model")
    model = load_original(run.source, run.dtype, run.device, separates_experts=True)
    install_attention(model, run.scheme, run.family)
    blocks = model.get_submodule(run.family.blocks).children()
    sites = [trained_sites(run.rules, index, block, run.seed) for index, block in enumerate(blocks)]
    network = RotatedNetwork.of(model, run.family, windows, sites, options.batch_windows)
    generator = generator_for(run.seed, "training of rotations")
    train_rotations(network, windows, training, options, generator, checkpoint, progress)
    del model, network
    give_back()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return training
