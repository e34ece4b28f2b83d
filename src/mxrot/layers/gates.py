"""The function between gate, up and down of an expert: of gate and up, or of up alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Product(nn.Module):
    """act(gate) * up."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """[..., I] of both to [..., I], in their type."""
        product: Tensor = self.activation(gate) * up
        return product


class Clamped(nn.Module):
    """(1 + up) * gate * sigmoid(alpha * gate), with gate at most `limit` and up within +-`limit` (gpt-oss)."""

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """[..., I] of both to [..., I], in their type."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


GATES: dict[str, Callable[[Any], nn.Module]] = {
    "product": lambda fused: Product(fused.act_fn),
    "clamped": lambda fused: Clamped(fused.alpha, fused.limit),
    "none": lambda fused: fused.act_fn,
}
"""Gates by `ExpertNames.gated`, made from transformers' module of all experts."""
