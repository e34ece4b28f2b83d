"""What a model calls its decoder blocks with, from passes in which no block computes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration.executor import Executor
from mxrot.calibration.hooks import StopForwardError, running, watched_inputs
from mxrot.calibration.placement import Placement
from mxrot.calibration.world import ONE, World
from mxrot.models import Family


@torch.no_grad()
def first_executor(
    model: PreTrainedModel,
    family: Family,
    windows: Tensor,
    batch_windows: int,
    world: World = ONE,
    groups: Mapping[str, Tensor] | None = None,
) -> Executor:
    """Before the first decoder block, for token windows [W, T] of this process of `world`.

    Only the embedding has to hold weights. `groups` are the positions of windows by what they are for; of those that
    are there, and no batch holds windows of two groups. Without, batches follow the windows.
    """
    device = _device_of(model, family)
    arguments = block_arguments(model, family, windows[:1])
    placement = Placement(device)
    kept: list[Tensor] = []
    ranges: dict[str, range] = {}
    batches: list[Tensor] = []
    for name, chosen in ({"": torch.arange(len(windows))} if groups is None else groups).items():
        own = [part for part in windows[chosen].split(batch_windows) if len(part)]
        ranges[name] = range(len(batches), len(batches) + len(own))
        batches += own
    tokens = sum(batch.numel() for batch in batches)
    for batch in batches:
        hidden = first_hidden(model, family, batch)
        if not kept:
            of_token = hidden.shape[-1] * hidden.element_size()
            if family.passes_on is not None:
                of_token += family.passes_on.token_bytes(model.config.get_text_config(), windows.shape[1])
            placement = Placement.of_states(device, tokens * of_token, world.peers.size)
        kept.append(placement.put(hidden))
    parts = None if groups is None else ranges
    return Executor(kept, arguments, placement, world, groups=parts, passes_on=family.passes_on)


@torch.no_grad()
def first_hidden(model: PreTrainedModel, family: Family, windows: Tensor) -> Tensor:
    """The hidden states [W, T, hidden] that the first decoder block gets for token windows [W, T]."""
    found: list[Tensor] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(arguments[0] if arguments else keywords["hidden_states"])
        raise StopForwardError

    handle = model.get_submodule(f"{family.blocks}.0").register_forward_pre_hook(hook, with_kwargs=True)
    try:
        _run_body(model, family, windows)
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def block_arguments(model: PreTrainedModel, family: Family, window: Tensor) -> list[dict[str, Any]]:
    """The keyword arguments of each decoder block for one token window [1, T], from a pass in which no block computes.

    They go with any number of windows of this length, which have no padding: masks and rotary embeddings have a batch
    dimension of 1. Blocks of one kind share their tensors, because the model gives them the same.
    """
    found: list[dict[str, Any]] = []

    def passes_on(hidden_states: Tensor, *others: None, **keywords: Any) -> Any:
        assert not any(one is not None for one in others)  # inputs of single blocks, which no family here has
        found.append(keywords)
        return family.as_given(hidden_states)

    with ExitStack() as stack:
        for block in model.get_submodule(family.blocks).children():
            stack.enter_context(running(block, passes_on))
        stack.enter_context(watched_inputs(model.get_submodule(family.final_norm), lambda _: None, stop=True))
        _run_body(model, family, window)
    return found


def _run_body(model: PreTrainedModel, family: Family, windows: Tensor) -> None:
    """Run `model` on token windows until a hook stops it."""
    with suppress(StopForwardError):
        model.get_submodule(family.body)(input_ids=windows.to(_device_of(model, family)), use_cache=False)


def _device_of(model: PreTrainedModel, family: Family) -> torch.device:
    device = model.get_submodule(family.embedding).weight.device
    assert isinstance(device, torch.device)
    return device
