"""What the processes of a run share of an evaluation: whole batches of windows, so that each figure of a window has the
bits that it has in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxrot.calibration import World


def own_batches(windows: Tensor, batch_windows: int, world: World) -> Sequence[Tensor]:
    """Of windows [W, T], so many at a time, the batches that this process takes; perhaps none where there are fewer of
    them than processes."""
    batches = windows.split(batch_windows)
    start, stop = (len(batches) * rank // world.size for rank in (world.rank, world.rank + 1))
    return batches[start:stop]


def of_all(found: Sequence[Tensor], world: World) -> Tensor:
    """What the batches of all processes have given, float64 [..., W] on the CPU, in the order of the windows."""
    own = torch.cat(list(found), dim=-1).double() if found else None
    return torch.cat([part.cpu() for part in world.gather(own)], dim=-1)
