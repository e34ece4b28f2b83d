"""Tiny models in folders, and what a changed source of them computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.float64 import InFloat64
from tests.tiny_model import random_windows, write_tiny_model
from torch import Tensor

from mxrot.models import Source
from mxrot.quantizing.loading import load_original
from mxrot.transforms.base import random_orthogonal

WINDOWS = random_windows(3, 20)


def write_with_biases(folder: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> Path:
    """A tiny Llama with biases in every linear, which count."""
    write_tiny_model(folder, torch.float64, **({"attention_bias": True, "mlp_bias": True} | changes))
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def rotation(size: int = 64, seed: int = 0) -> Tensor:
    """A random orthogonal matrix [size, size]."""
    return random_orthogonal(1, size, torch.Generator().manual_seed(seed))[0]


@torch.no_grad()
def logits(source: Source, windows: Tensor = WINDOWS) -> Tensor:
    """What the model of a source gives in float64."""
    with InFloat64():
        model = load_original(source, torch.float64, torch.device("cpu"))
        if source.family.experts is not None:
            model.set_experts_implementation("eager")  # the one that takes float64
        found: Tensor = model(windows).logits
    return found


def off_by(found: Tensor, expected: Tensor) -> float:
    """The largest difference beside the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
