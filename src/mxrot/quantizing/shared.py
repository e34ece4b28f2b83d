"""The sharing of windows and of a site's rows among the processes of a run. Statistics are reduced where they are
computed, and gradients in tuning/."""

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
    """Raise ConfigError for what several processes cannot do together, with this number of calibration windows."""
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
"""A share may deviate by 1 / UNEVEN of its size, if it then ends with a whole batch of one process. The results of a
batch then have the same bits."""


def own_windows(groups: Mapping[str, Tensor], at_once: int, world: World) -> dict[str, Tensor]:
    """The positions of each group that belong to this process, process after process; `at_once` windows pass through a
    block together.

    Shares are nearly equal. With at least as many windows as processes, none is empty.
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
    """An executor before the first block, for this process's share of `windows` [W, T]. `groups` are positions among
    them."""
    at_once = windows_at_once(model, run.family, run.device, windows.shape[1])
    if groups is None:
        windows = windows[own_windows({"": torch.arange(len(windows))}, at_once, run.world)[""]]
    else:
        groups = own_windows(groups, at_once, run.world)
    return first_executor(model, run.family, windows, at_once, run.world, groups)


def shares(groups: Sequence[Rows], world: World) -> Sequence[Rows]:
    """The rows of each group that this process rounds; the groups themselves if they are not shared."""
    if world.size == 1 or min(sum(rows.counts) for rows in groups) < world.size:
        return groups
    return [rows.share(world.rank, world.size) for rows in groups]


def gathered(weight: QTensor, world: World) -> QTensor:
    """The rows of all processes, one above the other."""
    parts = {name: gathered_rows(part, world) for name, part in weight.parts.tensors.items()}
    return QTensor(gathered_rows(weight.codes, world), weight.parts.with_tensors(parts), weight.format)


def gathered_rows(tensor: Tensor, world: World) -> Tensor:
    """The tensors [n, ...] of all processes, concatenated. A scalar is the same in all."""
    if tensor.dim() == 0:
        return tensor
    found = world.gather(tensor.contiguous().view(torch.uint8))
    return torch.cat(found).view(tensor.dtype)


def is_one_each(sites: Sequence[Site], world: World) -> bool:
    """True if there are as many sites, alike except for their expert, as processes that share the windows."""
    return 1 < world.size == len(sites) and len({site.linears for site in sites}) == 1


def by_itself(run: BlockRun, parts: Sequence[Part]) -> tuple[BlockRun, Part]:
    """The run of this process alone, and its own part of `parts`, one per process, with the tokens of all processes.

    An error in such a run is raised by one process alone. The others end at their next exchange.
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
    """The tensors of each process, by rank. Shapes and types are the same in all; the bytes are sent together."""
    like = list(own)
    counts = [tensor.nbytes for tensor in like]
    given = world.gather(torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in like]))
    return [
        iter([some.clone().view(one.dtype).view(one.shape) for some, one in zip(flat.split(counts), like, strict=True)])
        for flat in given
    ]


def check_alike(block: nn.Module, name: str, world: World) -> None:
    """Raise NumericsError unless a finished block has the same bytes in every process, because each goes on from its
    own."""
    if world.size == 1:
        return
    bytes_of = [value.contiguous().flatten().view(torch.uint8) for value in block.state_dict().values()]
    own = torch.stack([some.sum(dtype=torch.int64) for some in bytes_of])
    if any(not torch.equal(own, other) for other in world.gather(own)):
        raise NumericsError(
            f"{name}: the processes have come to different weights; start them on devices of one kind, with the same "
            "versions"
        )
