"""The division of an evaluation among the processes of a run. They share whole batches of windows, so that each figure
of a window has the same bits as in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxrot.calibration import World


def own_batches(windows: Tensor, batch_windows: int, world: World) -> Sequence[Tensor]:
    """The batches of this process, of windows [W, T] in batches of `batch_windows`. There are none if there are fewer
    batches than processes."""
    batches = windows.split(batch_windows)
    start, stop = (len(batches) * rank // world.size for rank in (world.rank, world.rank + 1))
    return batches[start:stop]


def of_all(found: Sequence[Tensor], world: World) -> Tensor:
    """The results of the batches of all processes, float64 [..., W] on the CPU, in the order of the windows."""
    own = torch.cat(list(found), dim=-1).double() if found else None
    return torch.cat([part.cpu() for part in world.gather(own)], dim=-1)
