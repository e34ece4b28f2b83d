"""The record that a run writes about itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from mxrot.recipe import Recipe
from mxrot.tuning import Check


@dataclass(frozen=True)
class LinearReport:
    """The errors of one quantized linear."""

    name: str
    shape: tuple[int, int]
    site: str
    weight_error: float
    """Relative Frobenius error of the transformed weights."""
    output_error: float | None
    """Relative Frobenius error of the output on calibration tokens, with quantized inputs; None without data."""
    damping: float | None
    """The damping with which the Hessian could be factorized; None without a Hessian."""
    tokens: int | None = None
    """The number of calibration tokens in the mean of the Hessian; None without one. With fewer tokens than inputs its
    rank is not full."""
    target_strength: float | None = None
    """1 / the chosen damping of the move towards the target, 0 for the own output; None if nothing was chosen."""


@dataclass(frozen=True)
class BlockReport:
    """The errors of one quantized decoder block."""

    index: int
    seconds: float
    linears: list[LinearReport]
    tuning: list[Check] | None = None
    """The losses of its reconstruction; None if it was not tuned by itself."""
    few_tokens: dict[str, int] = field(default_factory=dict)
    """The experts calibrated on all tokens of the block, with the number of tokens routed to them."""


@dataclass(frozen=True)
class Trial:
    """The score of a candidate of a choice, on windows that it was not fitted to."""

    candidate: str
    """The changes, on top of those kept before; empty for the unchanged recipe."""
    nats_per_token: dict[str, float]
    """KL(original || quantized), by the kind of text."""
    score: float
    """The geometric mean of these."""
    is_kept: bool
    """True if less than all before."""


@dataclass
class RunRecord:
    """Everything needed to describe a run, and to repeat it."""

    recipe: Recipe
    seed: int
    windows: tuple[int, int] | None
    """The number of calibration windows and their length; None without data."""
    device: str
    versions: dict[str, str]
    kernels: dict[str, Any] = field(default_factory=dict)
    """As `kernel_choices` returns them."""
    blocks: list[BlockReport] = field(default_factory=list)
    seconds: float = 0.0
    peak_gpu_bytes: int | None = None
    tuning: list[Check] | None = None
    """The losses of the distillation; None if the whole network was not tuned."""
    choice: list[Trial] | None = None
    """The tried candidates, in order; None if there was no choice."""
    left_out_of_recipe: list[str] = field(default_factory=list)
    """The parts of the given recipe that the model had no room for, one sentence each. They are not in `recipe`."""
    rotation_losses: list[float] | None = None
    """The cross entropy of the next token, in nats, before each step of the training of rotations, on the windows of
    that step; None without training."""
    head: LinearReport | None = None
    """The errors of the quantized head; None if it was not quantized."""

    def as_table(self) -> dict[str, Any]:
        """The record as a JSON table."""
        others = ("recipe", "blocks", "tuning", "choice", "head")
        plain = {key: value for key, value in vars(self).items() if key not in others}
        tuning = None if self.tuning is None else [asdict(check) for check in self.tuning]
        blocks = [asdict(block) for block in self.blocks]
        if not self.left_out_of_recipe:
            del plain["left_out_of_recipe"]
        tried = {} if self.choice is None else {"choice": [asdict(trial) for trial in self.choice]}
        head = {} if self.head is None else {"head": asdict(self.head)}
        return {"recipe": self.recipe.to_toml(), **plain, **tried, "tuning": tuning, "blocks": blocks, **head}


def alike(linears: Iterable[str]) -> dict[str, int]:
    """Full names of linears with stars for numbers, and the count of each."""
    return Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in linears)
