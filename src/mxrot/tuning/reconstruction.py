"""Block-wise reconstruction: one decoder block on the device is tuned to the output of the original block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mxrot.calibration import Executor
from mxrot.cuda_graphs import Replays
from mxrot.models import Family, Site
from mxrot.progress import Progress, silent
from mxrot.sections import Tuning
from mxrot.tuning.clipping import ClippedBlock
from mxrot.tuning.gains import learned_gains
from mxrot.tuning.loop import Check, Problem, deterministic, tune
from mxrot.tuning.network import lower_precision
from mxrot.tuning.shares import at_once, own_split
from mxrot.tuning.tuned_network import TunedNetwork, tuned_network
from mxrot.watching import Watch


def tune_block(
    executor: Executor,
    original: Executor,
    sites: Sequence[Site],
    options: Tuning,
    generator: torch.Generator,
    name: str,
    family: Family,
    rounding_type: Callable[[str], torch.dtype],
    progress: Progress = silent,
    watch: Watch | None = None,
) -> list[Check]:
    """Tune the quantized block of `executor`, in place. Its full name is `name`.

    The loss is the mean over tokens of |h - h_original|^2 / |h_original|^2 with h the block's output. Its inputs come
    from the quantized blocks before it, those of the block of `original` from the original model. `rounding_type` gives
    the type that a tensor is rounded to, by its full name. Each of several processes has its own windows, and a step
    takes some from each. All get the same block.
    """
    block, world = executor.block, executor.world
    train, test, held_out = own_split(executor.windows, options.held_out, world)
    dtypes = {key: parameter.dtype for key, parameter in block.named_parameters()}
    block.float()
    clips = options.moves == "clipping"
    tunable: TunedNetwork
    if clips:
        tunable = ClippedBlock.of(block, sites)
    else:
        norms = options.norm_rate > 0
        gains = learned_gains(block, name, family.norms_add_one, rounding_type) if norms else []
        tunable = tuned_network(
            [block], lambda _: sites, gains, lambda _, tensor: rounding_type(f"{name}.{tensor}"), options
        )
    arguments = in_type(executor.keywords, torch.float32)

    replay = Replays()

    def run(step: Callable[..., Tensor], chosen: list[int]) -> float:
        return float(replay(step.__name__, step, executor.stacked(chosen), original.stacked(chosen)))

    def measure(hidden: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad():
            expected = _first(original.block(wanted, **original.keywords)).float()
        tunable.begin()
        with lower_precision(executor.placement.device):
            found = _first(block(hidden.float(), **arguments))
        size = expected.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        return ((found - expected).square().sum(dim=-1) / size).mean()

    def learn(hidden: Tensor, wanted: Tensor) -> Tensor:
        loss = measure(hidden, wanted)
        loss.backward()
        return loss.detach()

    def backward(chosen: Tensor) -> float:
        return run(learn, [train[position] for position in chosen.tolist()])

    @torch.no_grad()
    def held_out_loss() -> float:
        size = at_once(options.batch_windows, world)
        parts = [test[start : start + size] for start in range(0, len(test), size)]
        losses = [run(measure, part) * len(part) for part in parts]
        tunable.settle()
        return world.total(sum(losses)) / held_out

    groups, windows = tunable.groups(options), torch.arange(len(train))
    problem = Problem(groups, backward, held_out_loss, tunable.settle, windows, name, are_own=True, rolls_back=clips)
    with deterministic(), torch.enable_grad():
        checks = tune(problem, options, generator, progress=progress, watch=watch, world=world)
    tunable.finish()
    for key, parameter in block.named_parameters():
        parameter.data = parameter.data.to(dtypes[key])
    return checks


def in_type(value: Any, dtype: torch.dtype) -> Any:
    """Convert floating-point tensors to another type, in dictionaries, lists and tuples too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_type(part, dtype) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(in_type(part, dtype) for part in value)
    return value


def _first(output: object) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found
