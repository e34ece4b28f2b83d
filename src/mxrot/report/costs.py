"""How long the parts of a comparison take beside each other, roughly: for the time to go, and for nothing else.

The unit is a token that passes through the model. What stands here was chosen by a look at a few runs; the pace of what
has been done corrects it.
"""

from __future__ import annotations

from collections.abc import Sequence

from mxrot.text import Windows
from mxrot.tokenizing import Calibration

ROUNDING = 2000.0
"""To read all weights, round and encode them."""
STATISTICS = 4.0
"""Of a calibration token: passes before and after the sites, moments, Hessians."""
TUNING = 4.0
"""Of a token in a step: the original, forwards and backwards."""
KL = 1.5
"""Of an evaluation token, with the head of the original."""
EXAMPLE = 400.0
"""Of an example of a task, with all its answers."""


def measuring_costs(read: Sequence[Windows], examples: Sequence[int]) -> list[float]:
    """Of each text, and of each task, which has so many examples."""
    return [*(KL * part.ids.numel() for part in read), *(EXAMPLE * count for count in examples)]


def quantizing_costs(calibration: Calibration) -> list[float]:
    """Of the phases that `quantize` tells: training of rotations, text that is written, candidates, orders of channels,
    the blocks, texts written for tuning, its light steps, its steps."""
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
