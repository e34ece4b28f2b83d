"""What keeps a run's results outside of its memory, so that an unfinished run can be gone on from."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mxrot.quantizing.record import BlockReport
from mxrot.tuning import TuningCheckpoint


class BlockStore(Protocol):
    """Takes finished blocks, and gives them back in a resumed run."""

    def load(self, index: int) -> tuple[dict[str, Tensor], BlockReport] | None:
        """Tensors by their names in the block, and its report; None if the store does not hold it."""

    def save(self, index: int, tensors: dict[str, Tensor], report: BlockReport) -> None:
        """Keep a finished block."""

    def save_rest(self, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors outside of the decoder blocks, by their full names."""

    @property
    def tuning_checkpoint(self) -> TuningCheckpoint:
        """Keeps tuning of the whole network until it is done."""

    @property
    def light_checkpoint(self) -> TuningCheckpoint:
        """Keeps the light steps before it until the run is done."""

    @property
    def polish_checkpoint(self) -> TuningCheckpoint:
        """Keeps the steps on gains after it until the run is done."""

    @property
    def rotation_checkpoint(self) -> TuningCheckpoint:
        """Keeps the training of rotations until the run is done."""

    @property
    def orders_checkpoint(self) -> TuningCheckpoint:
        """Keeps the orders of channels until the run is done."""

    @property
    def choice_checkpoint(self) -> TuningCheckpoint:
        """Keeps what candidates have cost until the run is done."""

    def load_windows(self, purpose: str) -> Tensor | None:
        """Windows that `save_windows` was given for it, given and written ones, or None."""

    def save_windows(self, purpose: str, windows: Tensor) -> None:
        """Keep the text that was written for calibration, or for tuning."""
