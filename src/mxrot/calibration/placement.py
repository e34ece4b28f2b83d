"""Where what is kept between two passes lies, on the device, in host memory or on disk, and how much may be kept."""

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
"""Bytes of a norm's outputs, and of a site's inputs, that are kept for a later pass; the rest is computed anew."""
KEPT_TIMES = 6
"""The states of one point of a model wait up to so many times: of the quantized model and of the original, each with
the outputs of its attention and its MLP."""
MOST_ON_DEVICE = {"cuda": 1 << 30}
"""Bytes of the states between two blocks that stay on a GPU of any size between passes, and submodules' outputs with
them."""
SHARE_OF_DEVICE = 1 / 5
"""Of a GPU's memory, that these states may take, all times together. Above both bounds host memory keeps them: the
copies take less time than what is computed with them, but page-locked memory takes long to be had."""
MOST_OF_HOST = 0.5
"""Of the main memory that can be had; what takes more lies on disk."""


def most_on_device(kind: str, memory: float | None) -> float:
    """Bytes of the states between two blocks that stay on a device of this type, which has so much memory."""
    always = MOST_ON_DEVICE.get(kind, math.inf)
    return always if memory is None else max(always, SHARE_OF_DEVICE * memory / KEPT_TIMES)


def memory_of(device: torch.device) -> float | None:
    """Bytes that a GPU has; None for another device."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def on_disk(size: float, available: float) -> bool:
    """Are states of so many bytes between two blocks kept on disk, where this much main memory can be had?"""
    return KEPT_TIMES * size > MOST_OF_HOST * available


def may_remember(kept: int, tensors: Iterable[Tensor]) -> bool:
    """Is there room for these beside the bytes that are kept?"""
    added = list(tensors)
    bound = MOST_REMEMBERED.get(added[0].device.type, MOST_REMEMBERED["cpu"])
    return kept + sum(tensor.nbytes for tensor in added) <= bound


@dataclass(frozen=True)
class Placement:
    """Where hidden states and submodules' outputs lie between passes."""

    device: torch.device
    """Where blocks compute."""
    is_on_host: bool = False
    """In host memory, instead of on the device?"""
    folder: Path | None = None
    """On disk there, as files that are mapped into memory and have no name; then `is_on_host` is set, too."""

    @staticmethod
    def of_states(device: torch.device, size: int, processes: int = 1) -> Placement:
        """Of blocks with so many bytes of states between two of them, in each of so many processes.

        On disk, in the folder of temporary files ($TMPDIR), where host memory is too small for them. DiskFullError if
        there is no room for them.
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
        """A tensor, or the tensors of a tuple, as they are kept between passes; on the host only `get` may read them,
        because the copy may be on its way."""
        if isinstance(value, tuple):
            return tuple(self.put(part) for part in value)
        if not self.is_on_host or not isinstance(value, Tensor):
            return value
        if self.folder is not None:
            return mapped(value, self.folder)
        kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=torch.cuda.is_available())
        return kept.copy_(value, non_blocking=True)

    def get(self, value: Any) -> Any:
        """What `put` was given."""
        if isinstance(value, tuple):
            return tuple(self.get(part) for part in value)
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value


def mapped(value: Tensor, folder: Path, what: str = "states between decoder blocks") -> Tensor:
    """A copy in a file that is mapped into memory. Its name is taken away at once: it goes when the tensor goes,
    whatever ends the process."""
    if not value.numel():
        return value.cpu()
    descriptor, name = tempfile.mkstemp(prefix="mxrot-", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk would end the process
            os.posix_fallocate(descriptor, 0, value.nbytes)
        kept = torch.from_file(name, shared=True, size=value.numel(), dtype=value.dtype)
    except OSError as error:
        raise DiskFullError(f"{folder}: no room for {what} ({error})") from error
    finally:
        os.close(descriptor)
        os.unlink(name)
    return kept.view(value.shape).copy_(value)
