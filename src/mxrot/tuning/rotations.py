"""Rotations trained on the quantized network's next-token cross entropy (SpinQuant, arXiv 2405.16406, section 3.2).

It is plain gradient descent over orthogonal matrices by Cayley steps. The learning rate falls along a cosine from its
start to 0. No part of the model is trained, so only the matrices are stored.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxrot.errors import CheckpointError, NumericsError
from mxrot.progress import Progress, silent
from mxrot.sections import Rotation
from mxrot.surgery import Rotations
from mxrot.tuning.cayley import cayley_step
from mxrot.tuning.loop import TuningCheckpoint
from mxrot.tuning.rotated_network import RotatedNetwork
from mxrot.tuning.shares import window_batches

KEEP_SECONDS = 20.0
"""The time between two steps at which an unfinished training, a few matrices, is stored."""


@dataclass
class RotationTraining:
    """The state of a training."""

    residual: Tensor | None
    """As in `Rotations`."""
    value_heads: Tensor | None
    losses: list[float] = field(default_factory=list)
    """The loss before each step, in nats per token, on the windows of that step."""

    @staticmethod
    def begin(
        start: Rotations, device: torch.device | str, checkpoint: TuningCheckpoint | None = None
    ) -> RotationTraining:
        """The state from `start`, or from `checkpoint`. CheckpointError if that is of another training."""
        residual, value_heads = (None if m is None else m.to(device) for m in (start.residual, start.value_heads))
        training = RotationTraining(residual, value_heads)
        if checkpoint is not None and (kept := checkpoint.load()):
            training.take_up(kept)
        return training

    @property
    def rotations(self) -> Rotations:
        return Rotations(self.residual, self.value_heads)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, for `take_up`."""
        named = {"residual": self.residual, "value_heads": self.value_heads}
        kept = {name: matrices for name, matrices in named.items() if matrices is not None}
        return kept | {"losses": torch.tensor(self.losses, dtype=torch.float64)}

    def take_up(self, kept: dict[str, Tensor]) -> None:
        """Resume from the tensors of an earlier run. CheckpointError if they are of another training."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.tensors().items() if name != "losses"}
        found = {name: tuple(tensor.shape) for name, tensor in kept.items() if name != "losses"}
        if expected != found or "losses" not in kept:
            raise CheckpointError(
                f"the state of training rotations is of {found}; expected {expected} and losses; start over with "
                "--force and without --resume"
            )
        self.losses = kept["losses"].tolist()
        for name in expected:
            setattr(self, name, kept[name].to(getattr(self, name).device))


def train_rotations(
    network: RotatedNetwork,
    windows: Tensor,
    training: RotationTraining,
    options: Rotation,
    generator: torch.Generator,
    checkpoint: TuningCheckpoint | None = None,
    progress: Progress = silent,
) -> None:
    """Continue `training` to the last step, on token windows [W, T]. Rotations that are None stay so.

    The same generator gives the same bits on one machine, whether or not a run is resumed from `checkpoint`.
    NumericsError if a loss or a gradient is not finite.
    """
    batches = list(window_batches(torch.arange(len(windows)), options.batch_windows, options.steps, generator))
    kept_at = time.monotonic()
    with network.open():
        for step in range(len(training.losses), options.steps):
            progress(step, options.steps, _told(training))
            loss = _step(network, windows[batches[step]], training, cosine_rate(step, options))
            training.losses.append(loss)
            is_last = step + 1 == options.steps
            if checkpoint is not None and (is_last or time.monotonic() - kept_at >= KEEP_SECONDS):
                checkpoint.save(training.tensors())
                kept_at = time.monotonic()
    progress(options.steps, options.steps, _told(training))


def cosine_rate(step: int, options: Rotation) -> float:
    """From `options.rate` at step 0 to 0 after the last."""
    return options.rate * 0.5 * (1 + math.cos(math.pi * step / options.steps))


def _step(network: RotatedNetwork, windows: Tensor, training: RotationTraining, rate: float) -> float:
    """One step of all matrices. Returns the loss before it."""
    residual, value_heads = (
        None if matrices is None else matrices.clone().requires_grad_()
        for matrices in (training.residual, training.value_heads)
    )
    loss = network.loss(windows, residual, value_heads)
    gradients = [matrices.grad for matrices in (residual, value_heads) if matrices is not None]
    if not math.isfinite(loss) or not all(g is not None and bool(torch.isfinite(g).all()) for g in gradients):
        raise NumericsError(
            f"training of rotations: the loss is {loss} at step {len(training.losses)}, and it or its gradient is not "
            "finite; take other calibration text or a smaller rotation.rate, or set rotation.steps = 0"
        )
    with torch.no_grad():
        if residual is not None and residual.grad is not None:
            training.residual = cayley_step(residual[None], residual.grad[None], rate)[0]
        if value_heads is not None and value_heads.grad is not None:
            training.value_heads = cayley_step(value_heads, value_heads.grad, rate)
    return loss


def _told(training: RotationTraining) -> str:
    last = f", loss {training.losses[-1]:.4g}" if training.losses else ""
    return f"training rotations{last}"
