"""Text that the original model writes, added to the given text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.calibration import Manner, World, generated_windows
from mxrot.models.tokenizer import load_tokenizer
from mxrot.progress import Progress, silent
from mxrot.quantizing.store import BlockStore
from mxrot.sections import CalibrationChoice
from mxrot.text import turns_of
from mxrot.transforms import generator_for


@dataclass(frozen=True)
class Writing:
    """How much text is written, and its purpose."""

    purpose: str
    """Names the text in a store, and seeds its random numbers."""
    count: int
    """The number of windows."""
    manner: Manner
    seed: int = 0

    def after(
        self,
        original: PreTrainedModel,
        windows: Tensor,
        given: int,
        store: BlockStore | None = None,
        progress: Progress = silent,
    ) -> Tensor:
        """`windows` [W, T], of which the first `given` are text, followed by those that `original` writes. A store gets
        all of them."""
        generator = generator_for(self.seed, f"windows for {self.purpose}")
        length, text = windows.shape[1], windows[:given]
        written = generated_windows(original, self.count, length, generator, text, self.manner, progress)
        found = torch.cat([windows, written])
        if store is not None:
            store.save_windows(self.purpose, found)
        return found


def by_the_first(purpose: str, write: Callable[[], Tensor], store: BlockStore | None, world: World) -> Tensor:
    """The windows stored for a purpose, or those that `write` returns. With several processes, the first one has the
    store, writes, and hands the windows to all."""
    kept = world.hand_out(None if store is None else store.load_windows(purpose))
    if kept is not None:
        return kept
    world.meet()  # from here on the others use no GPU memory
    found = world.hand_out(None if world.rank else write())
    assert found is not None
    return found


def manner_of(choice: CalibrationChoice, folder: Path, prompted: float) -> Manner:
    """How the model in a folder writes, with the share `prompted` that continues the text.

    Its tokenizer is read only for conversations; its errors are passed on.
    """
    turns = turns_of(load_tokenizer(folder)) if choice.chats else None
    return Manner(choice.first, prompted, choice.chats, choice.temperatures, turns)
