"""Mixtures of experts: linears for each expert replace transformers' tensors that hold all experts.

transformers computes the experts of a block with two tensors (`models/expert_names.py`). Here an expert is a module
with three linears, or two if it has no gate, so that each is quantized like any other linear. The router does not
change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.layers.gates import GATES
from mxrot.models.expert_names import ExpertNames
from mxrot.models.families import EXPERTS
from mxrot.models.skeleton import build_skeleton


class Expert(nn.Module):
    """An expert: down applied to gate and up, or to up alone. The linears have the names of checkpoints."""

    def __init__(self, linears: dict[str, nn.Linear], together: nn.Module) -> None:
        super().__init__()
        self.names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        *before, down = (self.get_submodule(name) for name in self.names)
        output: Tensor = down(self.together(*(linear(x) for linear in before)))
        return output


class Experts(nn.ModuleList):
    """The experts of a block. Each computes the tokens that the router assigns to it."""

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """[tokens, H] to [tokens, H]: the sum of the outputs of a token's experts, times their shares.

        `chosen` and `shares` [tokens, experts per token] come from the router. Sums are in the type of `x`, in the
        order of the experts.
        """
        result = torch.zeros_like(x)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self)).tolist()  # one synchronization with the device
        for expert, places in zip(self, order.split(counts), strict=True):
            if len(places):
                tokens = places // chosen.shape[1]
                output = expert(x[tokens]) * shares.flatten()[places, None]
                result.index_add_(0, tokens, output.to(result.dtype))
        return result


def separate_experts(model: nn.Module) -> None:
    """Replace transformers' modules of all experts of a block by `Experts`, with the same weights."""
    fused = [(name, module) for name, module in model.named_modules() if type(module).__name__ in EXPERTS]
    for name, module in fused:
        model.set_submodule(name, _separated(module, EXPERTS[type(module).__name__]))


def _separated(module: nn.Module, names: ExpertNames) -> Experts:
    parts: dict[str, nn.Parameter] = {}
    for fused in (f"{name}_bias" if kind == "bias" else name for kind in names.kinds for name in names.fused_names):
        whole = module.get_parameter(fused)
        for name, part in names.split(fused, whole.detach()).items():
            parts[name] = nn.Parameter(part, requires_grad=whole.requires_grad)
        delattr(module, fused)  # frees its memory
    together = GATES[names.gated](module)
    count = len(parts) // (len(names.linears) * len(names.kinds))
    experts = (
        Expert({name: _linear(parts, f"{number}.{name}") for name in names.linears}, together)
        for number in range(count)
    )
    return Experts(experts).train(module.training)


def _linear(parts: dict[str, nn.Parameter], name: str) -> nn.Linear:
    """The linear with a weight, and with a bias if there is one."""
    weight, bias = parts[f"{name}.weight"], parts.get(f"{name}.bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def build_apart(config: Any) -> PreTrainedModel:
    """Like `build_skeleton`, but each expert has its own linears, as needed for quantization."""
    model = build_skeleton(config)
    separate_experts(model)
    return model
