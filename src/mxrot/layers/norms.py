"""Norms of models as one operation each, if their class writes them as a chain of six operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mxrot.models import FAMILIES

PLAIN_NORMS = frozenset(family.norm_class for family in FAMILIES.values() if family.norm_class is not None)


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """While open, norms run as PyTorch's own operation. For float32 states the result is the same up to float32
    rounding."""
    norms = [module for module in model.modules() if type(module).__name__ in PLAIN_NORMS]
    for norm in norms:
        norm.forward = _FusedNorm(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


class _FusedNorm:
    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        weight, epsilon = self.norm.weight, self.norm.variance_epsilon
        assert isinstance(weight, Tensor) and isinstance(epsilon, float)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.rms_norm(x, weight.shape, weight, epsilon)
