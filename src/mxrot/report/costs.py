"""Rough relative costs of the parts of a comparison. They serve only to estimate the remaining time.

The unit is a token that passes through the model. The constants come from a few runs. The measured pace corrects them.
"""

from __future__ import annotations

from collections.abc import Sequence

from mxrot.text import Windows
from mxrot.tokenizing import Calibration

ROUNDING = 2000.0
"""Reading, rounding and encoding all weights."""
STATISTICS = 4.0
"""Per calibration token: passes before and after the sites, moments, Hessians."""
TUNING = 4.0
"""Per token of a step: the original, forwards and backwards."""
KL = 1.5
"""Per evaluation token, with the head of the original."""
EXAMPLE = 400.0
"""Per example of a task, with all its answers."""


def measuring_costs(read: Sequence[Windows], examples: Sequence[int]) -> list[float]:
    """The cost of each text, and of each task with this number of examples."""
    return [*(KL * part.ids.numel() for part in read), *(EXAMPLE * count for count in examples)]


def quantizing_costs(calibration: Calibration) -> list[float]:
    """The costs of the phases of `quantize`: training of rotations, text that is written, candidates, orders of
    channels, the blocks, texts written for tuning, its light steps, its steps."""
    recipe, windows = calibration.recipe, calibration.windows
    if windows is None:
        return [ROUNDING]
    given, length = windows.shape
    tokens, own = float(given * length), float(recipe.calibration.written(given) * length)
    rotation = recipe.rotation
    trained = [] if rotation is None else [TUNING * rotation.steps * rotation.batch_windows * length]
    written = [*trained, *([own] if own else [])]
    blocks = ROUNDING + STATISTICS * (tokens + own)
    if recipe.choice is not None:
        written.append((1 + len(recipe.choice.candidates)) * blocks)
    if recipe.permutation is not None:
        written.append(STATISTICS * (tokens + own))
    tuning = recipe.tuning
    if tuning is None:
        return [*written, blocks]
    steps = TUNING * tuning.steps * tuning.batch_windows * length
    if not recipe.tunes_network:
        return [*written, blocks + steps]
    around = tokens + recipe.calibration.own * length
    prompted = [each * around for each in (tuning.generated, tuning.rollouts) if each]
    one = TUNING * tuning.batch_windows * length
    light, polish = ([one * count] if count else [] for count in (tuning.light_steps, tuning.polish_steps))
    return [*written, blocks, *prompted, *light, steps, *polish]
