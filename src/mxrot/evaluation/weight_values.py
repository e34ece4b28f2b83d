"""The distribution of the weights of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.layers import QuantLinear, separate_experts
from mxrot.models import Family

REACH = 6.0
"""The first bin begins at -REACH root mean squares, the last ends at REACH. Values beyond count in these bins."""
BINS = 48


@torch.no_grad()
def weight_values(model: PreTrainedModel, family: Family) -> dict[str, Tensor]:
    """The number of weights in each of BINS equal bins, in units of the root mean square of their own linear, by site:
    int64 [BINS].

    For a quantized linear, they are the values of its codes and scales, after the transform. A linear of zeros counts
    in the bin of 0. Experts of `model` get separate linears.
    """
    separate_experts(model)
    counts: dict[str, Tensor] = {}
    for block in model.get_submodule(family.blocks).children():
        for site in family.sites:
            for name in site.linears:
                linear = block.get_submodule(name)
                assert isinstance(linear, QuantLinear | nn.Linear)
                weight = linear.dequantized_weight() if isinstance(linear, QuantLinear) else linear.weight
                counts[site.group] = counts.get(site.group, 0) + _counts(weight.float())
    return counts


def _counts(weight: Tensor) -> Tensor:
    scale = weight.square().mean().sqrt()
    relative = weight / scale if float(scale) > 0 else weight
    index = ((relative + REACH) * (BINS / (2 * REACH))).floor().clamp(0, BINS - 1)
    return torch.bincount(index.to(torch.int64).flatten(), minlength=BINS).cpu()
