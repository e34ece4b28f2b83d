"""The peak disk space that quantizing into a folder takes."""

from __future__ import annotations

from pathlib import Path

from mxrot.errors import FamilyError
from mxrot.layers import build_apart
from mxrot.models import WeightFiles, find_family, read_config
from mxrot.planning.run import Run
from mxrot.planning.shape import ModelShape
from mxrot.quantizing.rotating import config_after
from mxrot.recipe import Recipe
from mxrot.sections import Tuning

STATE_NUMBERS = 4
"""The float32 numbers per parameter of unfinished tuning: the current value, the best one, and two averages of Adam."""
TOKEN_BYTES = 8
"""The bytes of a token id, int64."""


def estimate_disk(run: Run) -> dict[str, float]:
    """The additional bytes, by their use."""
    after = run.shape.size_after(run.stored)
    found = {"the checkpoint": float(after.total_bytes)}
    tuning = run.recipe.tuning
    if tuning is not None and run.recipe.tunes_network:
        # The new state is written beside the old one.
        found["the state of tuning, twice while it is replaced"] = 2.0 * _state_bytes(run)
    if run.recipe.trains_rotations:
        found["the state of training rotations, twice while it is replaced"] = 2.0 * run.rotation_bytes
    written = run.tokens if run.recipe.calibration.writes else 0
    if tuning is not None and run.recipe.tunes_network:
        written += _written_for(tuning, run) * run.seq_len
    if written:
        found["the text that the model writes"] = float(TOKEN_BYTES * written)
    return found


def needed_on_disk(folder: Path, recipe: Recipe, windows: tuple[int, int]) -> float:
    """The total for the model in `folder`, with this number and length of windows. 0 if it cannot be determined."""
    try:
        config = read_config(folder)
        family = find_family(config, str(folder))
        shape = ModelShape.of(build_apart(config_after(config, recipe)), family, recipe)
        stored = WeightFiles(folder).dtype_of_most()
    except (FamilyError, AttributeError):  # quantizing reports the error
        return 0.0
    return sum(estimate_disk(Run(shape, recipe, "cpu", stored, *windows)).values())


def _written_for(tuning: Tuning, run: Run) -> int:
    """The windows that are kept for tuning: those of the text, then the written ones, at each of both times."""
    whole, kept = float(run.tuned_windows), 0.0
    for each in (tuning.generated, tuning.rollouts):
        whole += each * run.tuned_windows
        kept += whole if each else 0.0
    return round(kept)


def _state_bytes(run: Run) -> float:
    """The bytes of one state of tuning."""
    tuning = run.recipe.tuning
    assert tuning is not None
    weights = run.shape.quantized_weights
    transforms = run.shape.size_after(run.stored).transform_bytes // 2
    block = run.recipe.weights.quantizer().format.block or run.shape.widest
    parameters = weights * (1 + (tuning.exponent_rate > 0) / block) + transforms * (tuning.transform_rate > 0)
    if tuning.moves == "gains" or tuning.light_steps or tuning.polish_steps:
        # Per channel of each site, at most a gain or a scale, and a bias.
        channels = sum(site.inputs + sum(site.rows) for sites in run.shape.blocks for site in sites)
        light = channels + transforms * (tuning.light.transform_rate > 0)
        parameters = light + (parameters if tuning.moves != "gains" else 0.0)
    return 4.0 * STATE_NUMBERS * parameters
