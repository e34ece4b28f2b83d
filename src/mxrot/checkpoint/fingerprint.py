"""What decides about the bits of a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxrot.models import WeightFiles
from mxrot.recipe import Recipe
from mxrot.records import device_name, versions


def fingerprint_of(
    source: Path, recipe: Recipe, windows: Tensor | None, device: torch.device | str, seed: int
) -> dict[str, Any]:
    """What decides about the bits of a checkpoint."""
    data = None if windows is None else hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return {
        "model": WeightFiles(source).fingerprint(),
        "recipe": hashlib.sha256(recipe.to_toml().encode()).hexdigest(),
        "windows": data,
        "seed": seed,
        "device": device_name(torch.device(device)),
        "versions": versions(),
    }
