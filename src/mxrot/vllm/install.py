"""What vLLM has loaded into one of its layers becomes a quantized linear of mxrot. Only vLLM imports this module."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.utils import set_weight_attrs

from mxrot.kernels.fixed_rows import set_invariant_rows
from mxrot.layers import InputTransform, QuantLinear, prepare_site, warm_up_linear
from mxrot.scheme import SiteScheme
from mxrot.transforms.stages import BlockDiagonalSpec

BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
"""The environment variable of vLLM's batch-invariant mode."""


class SlicedTransform(nn.Module):
    """sqrt(B) T of the blocks that a linear reads here, out of all blocks in the checkpoint."""

    def __init__(self, stage: BlockDiagonalSpec, width: int, first: int) -> None:
        super().__init__()
        shape, dtype = stage.tensors(width)["weight"]
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        self.first = first
        set_weight_attrs(self.weight, {"weight_loader": self.load})

    def load(self, parameter: nn.Parameter, stored: Tensor, *shard: Any) -> None:
        """Take the matrices of these blocks. A single matrix serves all blocks."""
        matrices = parameter.data.view(-1, *stored.shape[-2:])
        matrices.copy_(stored[self.first : self.first + len(matrices)] if stored.dim() == 3 else stored)


def transform_module(name: str) -> str:
    """The name in its linear of the module of the transform called `name`."""
    return f"{name}_input"


def install_linear(
    layer: Any, linear: QuantLinear, scheme: SiteScheme, transform_name: str, dtype: torch.dtype, most_rows: int
) -> None:
    """Move the parameters of vLLM's layer, and its transform, into `linear`, which becomes `layer.quantized`. Its
    kernels are compiled for inputs of up to `most_rows` rows in `dtype`."""
    if os.environ.get(BATCH_INVARIANT, "0") not in ("", "0"):
        set_invariant_rows(True)
    for name in scheme.weights.stored_parts(linear.out_features, linear.in_features):
        setattr(linear, name, nn.Parameter(getattr(layer, name).data, requires_grad=False))
        delattr(layer, name)
    linear.fast = scheme.accumulation == "fast"
    if scheme.stages:
        module = transform_module(transform_name)
        stored: SlicedTransform = getattr(layer, module)
        linear.own_transform(transform_name, InputTransform(scheme.stages, {"weight": stored.weight.data}))
        delattr(layer, module)
    prepare_site((linear,))
    layer.add_module("quantized", linear)
    warm_up_linear(linear, dtype, most_rows)
