"""What a run writes down about itself."""

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
    """What quantizing one linear cost."""

    name: str
    shape: tuple[int, int]
    site: str
    weight_error: float
    """Relative Frobenius error of the transformed weights."""
    output_error: float | None
    """Relative Frobenius error of the output on calibration tokens, inputs quantized too; None without data."""
    damping: float | None
    """Damping of the Hessian that let it factorize; None without one."""
    tokens: int | None = None
    """Calibration tokens that the Hessian is a mean over; None without one. With fewer than the linear has inputs its
    rank is not full."""
    target_strength: float | None = None
    """1 / the damping of the way to the target that was chosen for the site, 0 for its own output; None where it was
    not chosen."""


@dataclass(frozen=True)
class BlockReport:
    """What quantizing one decoder block cost."""

    index: int
    seconds: float
    linears: list[LinearReport]
    tuning: list[Check] | None = None
    """Losses of its reconstruction; None where it was not tuned by itself."""
    few_tokens: dict[str, int] = field(default_factory=dict)
    """Experts that were calibrated on all tokens of the block, with the number of those that were sent to them."""


@dataclass(frozen=True)
class Trial:
    """What a candidate of a choice has cost, on windows that it was not fitted to."""

    candidate: str
    """The changes, on top of what had been kept before; empty for the recipe as it is."""
    nats_per_token: dict[str, float]
    """KL(original || quantized) by the kind of text."""
    score: float
    """Their geometric mean."""
    is_kept: bool
    """Less than all before?"""


@dataclass
class RunRecord:
    """Everything needed to say what a run did, and to do it again."""

    recipe: Recipe
    seed: int
    windows: tuple[int, int] | None
    """Calibration windows and their length; None without data."""
    device: str
    versions: dict[str, str]
    kernels: dict[str, Any] = field(default_factory=dict)
    """As of `kernel_choices`."""
    blocks: list[BlockReport] = field(default_factory=list)
    seconds: float = 0.0
    peak_gpu_bytes: int | None = None
    tuning: list[Check] | None = None
    """Losses of the distillation; None where the whole network was not tuned."""
    choice: list[Trial] | None = None
    """What was tried, in this order; None where there was nothing to choose."""
    left_out_of_recipe: list[str] = field(default_factory=list)
    """What the model had no room for of the recipe that was given, a sentence each; it is not in `recipe`."""
    rotation_losses: list[float] | None = None
    """Cross entropy of the next token, in nats, at each step of the training of rotations, on its windows and before
    it; None where none were trained."""
    head: LinearReport | None = None
    """What quantizing the head cost; None where it was left as it is."""

    def as_table(self) -> dict[str, Any]:
        """The record as JSON takes it."""
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
    """Full names of linears with stars for numbers, and how many there are of each."""
    return Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in linears)
