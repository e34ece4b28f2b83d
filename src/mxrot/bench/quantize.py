"""The time of quantizing, and of its parts."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mxrot import api, quantizing
from mxrot.models import find_model
from mxrot.progress import Progress, silent
from mxrot.recipe import Recipe


@dataclass(frozen=True)
class QuantizeRow:
    """One recipe."""

    recipe: str
    windows: tuple[int, int] | None
    """The calibration windows and their length, including those that the model writes."""
    seconds: list[float]
    """The seconds of each run. The first one compiles kernels."""
    blocks: list[float]
    """The seconds of each decoder block in the last run. The rest of the time goes to text, tuning and other work."""
    peak_gpu_bytes: int | None


def bench_quantize(
    model: str,
    recipes: Sequence[Recipe],
    device: torch.device,
    calib: Any = "demo",
    samples: int | None = None,
    seq_len: int | None = None,
    repeats: int = 3,
    progress: Progress = silent,
) -> list[QuantizeRow]:
    """Quantize `model` in memory by each recipe, `repeats` times after the first run."""
    folder, rows = find_model(model), []
    for recipe in recipes:
        windows = api.calibrate(folder, recipe, calib, samples, seq_len).windows
        seconds: list[float] = []
        for _ in range(1 + repeats):
            result = quantizing.quantize(folder, recipe, windows=windows, device=device, progress=progress)
            record = result.record
            seconds.append(record.seconds)
            del result
            gc.collect()
        blocks = [block.seconds for block in record.blocks]
        rows.append(QuantizeRow(recipe.name, record.windows, seconds, blocks, record.peak_gpu_bytes))
    return rows
