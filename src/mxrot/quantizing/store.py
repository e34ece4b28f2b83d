"""A store for a run's results outside of its memory, so that an unfinished run can be resumed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mxrot.quantizing.record import BlockReport
from mxrot.tuning import TuningCheckpoint


class BlockStore(Protocol):
    """Stores finished blocks, and returns them in a resumed run."""

    def load(self, index: int) -> tuple[dict[str, Tensor], BlockReport] | None:
        """The tensors by their names in the block, and its report; None if the store does not hold the block."""

    def save(self, index: int, tensors: dict[str, Tensor], report: BlockReport) -> None:
        """Store a finished block."""

    def save_rest(self, tensors: dict[str, Tensor]) -> None:
        """Store the tensors outside of the decoder blocks, by their full names."""

    @property
    def tuning_checkpoint(self) -> TuningCheckpoint:
        """Stores the tuning of the whole network until it is done."""

    @property
    def light_checkpoint(self) -> TuningCheckpoint:
        """Stores the light steps before that tuning until the run is done."""

    @property
    def polish_checkpoint(self) -> TuningCheckpoint:
        """Stores the steps on gains after that tuning until the run is done."""

    @property
    def rotation_checkpoint(self) -> TuningCheckpoint:
        """Stores the training of rotations until the run is done."""

    @property
    def orders_checkpoint(self) -> TuningCheckpoint:
        """Stores the orders of channels until the run is done."""

    @property
    def choice_checkpoint(self) -> TuningCheckpoint:
        """Stores the scores of candidates until the run is done."""

    def load_windows(self, purpose: str) -> Tensor | None:
        """The windows stored by `save_windows` for this purpose, given and written ones; None if there are none."""

    def save_windows(self, purpose: str, windows: Tensor) -> None:
        """Store the text written for calibration, or for tuning."""
