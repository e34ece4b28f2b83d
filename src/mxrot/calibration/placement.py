"""Where data waits between two passes: on the device, in host memory or on disk, and how much of it."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxrot.environment import available_memory
from mxrot.errors import DiskFullError

MOST_REMEMBERED = {"cpu": 1 << 28, "cuda": 1 << 31}
"""The most bytes of a norm's outputs, and of a site's inputs, kept for a later pass. The rest is computed again."""
KEPT_TIMES = 6
"""The most copies of one point's states that wait: of the quantized model and of the original, each with the outputs of
its attention and its MLP."""
MOST_ON_DEVICE = {"cuda": 1 << 30}
"""The most bytes of states between two blocks that stay on a GPU of any size between passes, together with submodules'
outputs."""
SHARE_OF_DEVICE = 1 / 5
"""The share of a GPU's memory for all copies of these states. Above both bounds host memory keeps them: the copies take
less time than the computation, but allocating page-locked memory is slow."""
MOST_OF_HOST = 0.5
"""The share of the available main memory that may be used. Larger data lies on disk."""


def most_on_device(kind: str, memory: float | None) -> float:
    """The most bytes of states between two blocks that stay on a device of this type with this much memory."""
    always = MOST_ON_DEVICE.get(kind, math.inf)
    return always if memory is None else max(always, SHARE_OF_DEVICE * memory / KEPT_TIMES)


def memory_of(device: torch.device) -> float | None:
    """The bytes of a GPU; None for another device."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def on_disk(size: float, available: float) -> bool:
    """True if states of `size` bytes between two blocks go to disk, with this much main memory available."""
    return KEPT_TIMES * size > MOST_OF_HOST * available


def may_remember(kept: int, tensors: Iterable[Tensor]) -> bool:
    """True if there is room for these tensors beside the `kept` bytes."""
    added = list(tensors)
    bound = MOST_REMEMBERED.get(added[0].device.type, MOST_REMEMBERED["cpu"])
    return kept + sum(tensor.nbytes for tensor in added) <= bound


@dataclass(frozen=True)
class Placement:
    """Where hidden states and submodules' outputs lie between passes."""

    device: torch.device
    """The device on which blocks compute."""
    is_on_host: bool = False
    """True if in host memory instead of on the device."""
    folder: Path | None = None
    """The folder for nameless memory-mapped files, if they lie on disk. Then `is_on_host` is also set."""

    @staticmethod
    def of_states(device: torch.device, size: int, processes: int = 1) -> Placement:
        """The placement for `size` bytes of states between two blocks, in each of `processes` processes.

        They go to disk, in the folder of temporary files ($TMPDIR), if host memory is too small. DiskFullError if the
        disk has no room for them.
        """
        is_on_host = size > most_on_device(device.type, memory_of(device))
        waits_on_host, available = is_on_host or device.type == "cpu", available_memory()
        if not waits_on_host or available is None or not on_disk(size * processes, available):
            return Placement(device, is_on_host)
        wanted = KEPT_TIMES * size * processes
        folder = Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
        if wanted > free:
            raise DiskFullError(
                f"{folder}: states between decoder blocks take up to {wanted / 1e9:.1f} GB, more than half of the "
                f"main memory that is free, and {free / 1e9:.1f} GB are free on this disk; set TMPDIR to a folder with "
                "more room, or take fewer --samples"
            )
        return Placement(device, True, folder)

    def put(self, value: Any) -> Any:
        """A tensor, or the tensors of a tuple, as kept between passes. On the host only `get` may read them, because
        the copy may still be running."""
        if isinstance(value, tuple):
            return tuple(self.put(part) for part in value)
        if not self.is_on_host or not isinstance(value, Tensor):
            return value
        if self.folder is not None:
            return mapped(value, self.folder)
        kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=torch.cuda.is_available())
        return kept.copy_(value, non_blocking=True)

    def get(self, value: Any) -> Any:
        """The value given to `put`."""
        if isinstance(value, tuple):
            return tuple(self.get(part) for part in value)
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value


def mapped(value: Tensor, folder: Path, what: str = "states between decoder blocks") -> Tensor:
    """A copy in a memory-mapped file. The file's name is removed at once: the file ends with the tensor, however the
    process ends."""
    if not value.numel():
        return value.cpu()
    descriptor, name = tempfile.mkstemp(prefix="mxrot-", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk would kill the process
            os.posix_fallocate(descriptor, 0, value.nbytes)
        kept = torch.from_file(name, shared=True, size=value.numel(), dtype=value.dtype)
    except OSError as error:
        raise DiskFullError(f"{folder}: no room for {what} ({error})") from error
    finally:
        os.close(descriptor)
        os.unlink(name)
    return kept.view(value.shape).copy_(value)
