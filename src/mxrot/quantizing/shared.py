"""What the processes of a run share: windows, and the rows of a site. Statistics are reduced where they are taken, and
gradients in tuning/."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration import ONE, Executor, World, first_executor, handed_out
from mxrot.calibration.site_weights import Rows
from mxrot.errors import ConfigError, NumericsError
from mxrot.formats import QTensor
from mxrot.models import Site
from mxrot.quantizing.batches import windows_at_once
from mxrot.quantizing.part import BlockRun, Part
from mxrot.recipe import Recipe


def check_shared(recipe: Recipe, windows: int | None, processes: int) -> None:
    """ConfigError for what several processes do not do together, with so many calibration windows."""
    if processes == 1:
        return
    for said, is_wanted in (
        ("the training of rotations; set rotation.steps = 0", recipe.trains_rotations),
        ("a choice among candidates; set choice = none", recipe.choice is not None),
    ):
        if is_wanted:
            raise ConfigError(f"recipe {recipe.name}: {processes} processes do not share {said}, or start one process")
    if windows is not None and windows < processes:
        raise ConfigError(f"{processes} processes share {windows} calibration windows; start fewer, or give more text")


UNEVEN = 8
"""A share may be so much of itself, as a divisor, off: where shares then end with batches of one process, what is
computed of a batch has the same bits."""


def own_windows(groups: Mapping[str, Tensor], at_once: int, world: World) -> dict[str, Tensor]:
    """Of the positions of each group those that this process takes, one process behind the other; so many windows pass
    through a block `at_once`.

    Each has nearly as many, and none is without any where there are as many as processes.
    """
    found, turn = {}, 0
    for name, places in groups.items():
        each, left = divmod(len(places), world.size)
        counts = [each + ((rank - turn) % world.size < left) for rank in range(world.size)]
        ends = [sum(counts[:rank]) for rank in range(world.size + 1)]
        for position, end in enumerate(ends[1:-1], 1):
            of_batch = round(end / at_once) * at_once
            if abs(of_batch - end) * UNEVEN <= each:
                ends[position] = of_batch
        found[name] = places[ends[world.rank] : ends[world.rank + 1]]
        turn = (turn + left) % world.size
    return found


def own_executor(
    run: BlockRun, model: PreTrainedModel, windows: Tensor, groups: Mapping[str, Tensor] | None = None
) -> Executor:
    """Before the first block, for the share of this process of `windows` [W, T]; `groups` are positions among them."""
    at_once = windows_at_once(model, run.family, run.device, windows.shape[1])
    if groups is None:
        windows = windows[own_windows({"": torch.arange(len(windows))}, at_once, run.world)[""]]
    else:
        groups = own_windows(groups, at_once, run.world)
    return first_executor(model, run.family, windows, at_once, run.world, groups)


def shares(groups: Sequence[Rows], world: World) -> Sequence[Rows]:
    """Of each group the rows that this process rounds; the groups themselves where they are not shared."""
    if world.size == 1 or min(sum(rows.counts) for rows in groups) < world.size:
        return groups
    return [rows.share(world.rank, world.size) for rows in groups]


def gathered(weight: QTensor, world: World) -> QTensor:
    """The rows of all processes, one above the other."""
    parts = {name: gathered_rows(part, world) for name, part in weight.parts.tensors.items()}
    return QTensor(gathered_rows(weight.codes, world), weight.parts.with_tensors(parts), weight.format)


def gathered_rows(tensor: Tensor, world: World) -> Tensor:
    """Of a tensor [n, ...] those of all processes; a scalar is the same in all."""
    if tensor.dim() == 0:
        return tensor
    found = world.gather(tensor.contiguous().view(torch.uint8))
    return torch.cat(found).view(tensor.dtype)


def is_one_each(sites: Sequence[Site], world: World) -> bool:
    """Are there as many sites, alike but for the expert that they are in, as processes that share the windows?"""
    return 1 < world.size == len(sites) and len({site.linears for site in sites}) == 1


def by_itself(run: BlockRun, parts: Sequence[Part]) -> tuple[BlockRun, Part]:
    """The run of this process without the others, and the part that is its own, of as many as there are processes, with
    the tokens that all have for it.

    What such a run raises, one process raises alone; the others end at their next exchange.
    """
    world, own = run.world, parts[run.world.rank]
    if own.executor is not None:
        own = replace(own, executor=handed_out([part.executor for part in parts if part.executor is not None], world))
    if own.original is not None:
        own = replace(own, original=handed_out([part.original for part in parts if part.original is not None], world))
    for part in parts:
        if part.executor is not None:
            part.executor.forget_inputs()
    return replace(run, world=ONE), own


def each_of(own: Iterable[Tensor], world: World) -> list[Iterator[Tensor]]:
    """What each process has, by rank, of tensors of the same shapes and types in all; their bytes pass at once."""
    like = list(own)
    counts = [tensor.nbytes for tensor in like]
    given = world.gather(torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in like]))
    return [
        iter([some.clone().view(one.dtype).view(one.shape) for some, one in zip(flat.split(counts), like, strict=True)])
        for flat in given
    ]


def check_alike(block: nn.Module, name: str, world: World) -> None:
    """NumericsError unless a finished block has the same bytes in every process: each goes on from its own."""
    if world.size == 1:
        return
    bytes_of = [value.contiguous().flatten().view(torch.uint8) for value in block.state_dict().values()]
    own = torch.stack([some.sum(dtype=torch.int64) for some in bytes_of])
    if any(not torch.equal(own, other) for other in world.gather(own)):
        raise NumericsError(
            f"{name}: the processes have come to different weights; start them on devices of one kind, with the same "
            "versions"
        )
