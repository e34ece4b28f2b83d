"""Networks with rotations, of models in folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mxrot.models import Source, value_heads
from mxrot.quantizing.loading import load_original
from mxrot.surgery import Rotations
from mxrot.transforms.base import random_orthogonal
from mxrot.tuning.rotated_network import RotatedNetwork
from mxrot.tuning.trained_sites import Rounds, TrainedSite


def random_rotations(source: Source, seed: int = 0) -> Rotations:
    """Of the stream and of all value heads."""
    generator = torch.Generator().manual_seed(seed)
    config = source.config
    return Rotations(
        random_orthogonal(1, config.hidden_size, generator)[0],
        random_orthogonal(config.num_hidden_layers, value_heads(config)[1], generator),
    )


def network_of(
    source: Source,
    windows: Tensor,
    rounds: Rounds | None = None,
    weights: Rounds | None = None,
    dtype: torch.dtype = torch.float64,
) -> RotatedNetwork:
    """All sites round their inputs by `rounds` and their weights by `weights`; None for what stays as it is."""
    sites = [
        [TrainedSite(site, None, rounds, weights) for site in source.family.sites_of(index)]
        for index in range(source.config.num_hidden_layers)
    ]
    return network_with(source, windows, sites, dtype)


def network_with(
    source: Source, windows: Tensor, sites: Sequence[Sequence[TrainedSite]], dtype: torch.dtype = torch.float64
) -> RotatedNetwork:
    model = load_original(source, dtype, torch.device("cpu"), separates_experts=True)
    return RotatedNetwork.of(model, source.family, windows, sites, len(windows), dtype)


def loss_and_gradients(network: RotatedNetwork, windows: Tensor, rotations: Rotations) -> tuple[Any, ...]:
    """The loss, and its gradients for the rotations that there are: of the residual stream, and of value heads."""
    assert rotations.residual is not None
    both = (rotations.residual, rotations.value_heads)
    residual, heads = (None if m is None else m.clone().requires_grad_() for m in both)
    with network.open():
        loss = network.loss(windows, residual, heads)
    gradients = [m.grad for m in (residual, heads) if m is not None]
    assert all(gradient is not None for gradient in gradients)
    return loss, *gradients
