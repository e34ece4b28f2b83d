"""Mixtures of experts: linears of each expert in the place of transformers' tensors that hold all experts.

transformers computes the experts of a block with two tensors, [E, 2I, H] and [E, H, I]; checkpoints hold three linears
an expert. Here an expert is a module with these three, so that each is quantized like any other linear. The router is
left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.errors import FamilyError
from mxrot.models.family import Family, Site

_FUSED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertNames:
    """How the experts of an architecture are called."""

    fused: str
    """transformers' class that holds all experts of a block."""
    count: str
    """What the config calls the number of experts."""
    linears: tuple[str, str, str]
    """gate, up and down of an expert, as checkpoints call them."""
    place: str = "mlp.experts"
    """Where experts are in a block."""
    router: str = "mlp.gate"
    """Module that says which experts a token goes to; it reads what they read."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Starts of names in a block in older checkpoints, and what they are in the model."""

    def sites(self, config: Any) -> tuple[Site, ...]:
        """One site for gate and up of all experts, and one for down of each.

        FamilyError if a token cannot be sent to as many experts as the config says.
        """
        count, each = getattr(config, self.count), config.num_experts_per_tok
        if not 1 <= each <= count:
            raise FamilyError(f"config.json: expected 1 to {count} experts a token (of {self.count}), got {each}")
        gate, up, down = self.linears
        experts = [f"{self.place}.{number}" for number in range(count)]
        gate_up = Site(
            "gate_up",
            tuple(f"{expert}.{name}" for expert in experts for name in (gate, up)),
            norm="post_attention_layernorm",
            experts=self.place,
            router=self.router,
        )
        downs = (
            Site(f"down_{number}", (f"{expert}.{down}",), producer=f"{expert}.{up}", expert=expert, kind="down")
            for number, expert in enumerate(experts)
        )
        return (gate_up, *downs)

    def apart(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block with one for each linear, whichever way they are stored."""
        found: dict[str, Tensor] = {}
        for stored, tensor in tensors.items():
            name = self._renamed(stored)
            place, _, last = name.rpartition(".")
            if place == self.place and last in _FUSED and tensor.dim() == 3:
                found |= {f"{place}.{key}.weight": part for key, part in self.split(last, tensor).items()}
            else:
                found[name] = tensor
        return found

    def shapes_apart(self, stored: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of the tensors that `apart` makes of one that is stored, the shapes by name."""
        name = self._renamed(stored)
        place, _, last = name.rpartition(".")
        if place != self.place or last not in _FUSED or len(shape) != 3:
            return {name: shape}
        count, rows, width = shape
        gate, up, down = self.linears
        each = {down: (rows, width)} if last == "down_proj" else dict.fromkeys((gate, up), (rows // 2, width))
        return {f"{place}.{number}.{key}.weight": size for number in range(count) for key, size in each.items()}

    def _renamed(self, stored: str) -> str:
        return next((new + stored.removeprefix(old) for old, new in self.renamed if stored.startswith(old)), stored)

    def together(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block as transformers' own module takes them; `tensors` as `apart` gives them."""
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{self.place}.")}
        found = {name: tensor for name, tensor in tensors.items() if name not in inside}
        try:
            gate, up, down = (
                torch.stack([inside[f"{self.place}.{number}.{name}.weight"] for number in range(len(inside) // 3)])
                for name in self.linears
            )
        except KeyError as error:
            raise FamilyError(f"no tensor ends with {error.args[0]}; is the download complete?") from error
        whole = {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}
        return found | {f"{self.place}.{name}": tensor for name, tensor in whole.items()}

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The linears in transformers' tensor `name` of all experts, as copies, by number and name."""
        gate, up, down = self.linears
        if name == "down_proj":
            return {f"{number}.{down}": one.clone() for number, one in enumerate(tensor)}
        halves = [(number, part, half) for number, one in enumerate(tensor) for part, half in enumerate(one.chunk(2))]
        return {f"{number}.{(gate, up)[part]}": half.clone() for number, part, half in halves}


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)), with the linears under the names that checkpoints give them."""

    def __init__(self, linears: dict[str, nn.Linear], activation: nn.Module) -> None:
        super().__init__()
        self.names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        output: Tensor = down(self.activation(gate(x)) * up(x))
        return output


class Experts(nn.ModuleList):
    """The experts of a block; each computes the tokens that the router sends it."""

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """[tokens, H] to [tokens, H]: the sum over a token's experts, times their shares.

        `chosen` and `shares` [tokens, experts a token] come from the router. Sums run in the type of `x`, in the order
        of the experts.
        """
        result = torch.zeros_like(x)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self)).tolist()  # one wait for the device
        for expert, places in zip(self, order.split(counts), strict=True):
            if len(places):
                tokens = places // chosen.shape[1]
                output = expert(x[tokens]) * shares.flatten()[places, None]
                result.index_add_(0, tokens, output.to(result.dtype))
        return result


def shapes_apart(shapes: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by name, with one for each linear of each expert."""
    if family.experts is None:
        return dict(shapes)
    found: dict[str, tuple[int, ...]] = {}
    block = re.compile(rf"({re.escape(family.blocks)}\.\d+\.)(.*)")
    for name, shape in shapes.items():
        match = block.match(name)
        if match is None:
            found[name] = shape
        else:
            found |= {match[1] + key: value for key, value in family.experts.shapes_apart(match[2], shape).items()}
    return found


def separate_experts(model: nn.Module) -> None:
    """Replace transformers' modules of all experts of a block by `Experts`, with the same weights."""
    fused = [(name, module) for name, module in model.named_modules() if type(module).__name__ in EXPERTS]
    for name, module in fused:
        model.set_submodule(name, _separated(module, EXPERTS[type(module).__name__]))


def _separated(module: nn.Module, names: ExpertNames) -> Experts:
    linears: dict[str, nn.Linear] = {}
    for fused in _FUSED:
        whole = module.get_parameter(fused)
        for name, weight in names.split(fused, whole.detach()).items():
            linears[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linears[name].weight = nn.Parameter(weight, requires_grad=whole.requires_grad)
        delattr(module, fused)  # its memory
    activation = module.act_fn
    assert isinstance(activation, nn.Module)
    experts = (
        Expert({name: linears[f"{number}.{name}"] for name in names.linears}, activation)
        for number in range(len(linears) // 3)
    )
    return Experts(experts).train(module.training)


MIXTRAL_EXPERTS = ExpertNames(
    "MixtralExperts", "num_local_experts", ("w1", "w3", "w2"), renamed=(("block_sparse_moe.", "mlp."),)
)
QWEN3_EXPERTS = ExpertNames("Qwen3MoeExperts", "num_experts", ("gate_proj", "up_proj", "down_proj"))
EXPERTS = {names.fused: names for names in (MIXTRAL_EXPERTS, QWEN3_EXPERTS)}
