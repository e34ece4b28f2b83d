"""Text that the original model writes itself, behind the text that is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.calibration import generated_windows
from mxrot.progress import Progress, silent
from mxrot.quantizing.store import BlockStore
from mxrot.transforms import generator_for


@dataclass(frozen=True)
class Writing:
    """How much is written, and what for."""

    purpose: str
    """Names the text in a store, and draws other numbers than another purpose."""
    each: float
    """Windows for every given one."""
    prompted: float = 0.0
    """Share of what is written that goes on from pieces of the text."""
    seed: int = 0

    def after(
        self,
        original: PreTrainedModel,
        windows: Tensor,
        given: int,
        store: BlockStore | None = None,
        progress: Progress = silent,
    ) -> Tensor:
        """`windows` [W, T], of which the first `given` are text, and after them what `original` writes; a store gets
        all of them."""
        generator = generator_for(self.seed, f"windows for {self.purpose}")
        count = windows_to_write(self.each, given)
        length, text = windows.shape[1], windows[:given]
        written = generated_windows(original, count, length, generator, text, self.prompted, progress)
        found = torch.cat([windows, written])
        if store is not None:
            store.save_windows(self.purpose, found)
        return found


def windows_to_write(each: float, given: int) -> int:
    """How many windows the original model writes: `each` for every one of the `given`."""
    return max(1, round(each * given))
