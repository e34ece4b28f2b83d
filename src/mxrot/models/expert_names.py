"""How the experts of a mixture are called, together as transformers has them and apart as checkpoints do.

transformers computes the experts of a block with two tensors, [E, 2I, H] and [E, H, I]; checkpoints hold three linears
an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxrot.errors import FamilyError
from mxrot.models.site import Site

DENSE, SPARSE = "dense", "sparse"
"""Kinds of decoder blocks, where some have a plain MLP in the place of experts."""
FUSED = ("gate_up_proj", "down_proj")
"""What transformers calls its two tensors."""


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
    routers: tuple[str, ...] = ("mlp.gate",)
    """Modules that say which experts a token goes to, and how much each counts; they read what experts read."""
    shared: str | None = None
    """The expert that every token goes to beside the others, by its name in a block."""
    shared_count: str | None = None
    """What the config calls the number of those, where a model may have none."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Starts of names in a block in older checkpoints, and what they are in the model."""

    def sites(self, config: Any) -> tuple[Site, ...]:
        """One site for gate and up of all experts, and one for down of each; the shared one is the last of them.

        FamilyError if a token cannot be sent to as many experts as the config says.
        """
        count, each = getattr(config, self.count), config.num_experts_per_tok
        if not 1 <= each <= count:
            raise FamilyError(f"config.json: expected 1 to {count} experts a token (of {self.count}), got {each}")
        gate, up, down = self.linears
        experts = [f"{self.place}.{number}" for number in range(count)]
        shared = [] if self.shared is None or not self._count_of_shared(config) else [self.shared]
        gate_up = Site(
            "gate_up",
            tuple(f"{expert}.{name}" for expert in (*experts, *shared) for name in (gate, up)),
            norm="post_attention_layernorm",
            experts=self.place,
            routers=self.routers,
        )
        downs = (
            Site(f"down_{number}", (f"{expert}.{down}",), producer=f"{expert}.{up}", expert=expert, kind="down")
            for number, expert in enumerate(experts)
        )
        of_shared = (
            Site("shared_down", (f"{expert}.{down}",), producer=f"{expert}.{up}", expert=expert) for expert in shared
        )
        return (gate_up, *downs, *of_shared)

    def _count_of_shared(self, config: Any) -> int:
        return 1 if self.shared_count is None else int(getattr(config, self.shared_count))

    def share(self, config: Any, linear: str) -> float:
        """Of the tokens, that a linear of an expert gets, by its name in a block."""
        if not linear.startswith(f"{self.place}."):
            return 1.0
        return float(config.num_experts_per_tok / getattr(config, self.count))

    def apart(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block with one for each linear, whichever way they are stored."""
        found: dict[str, Tensor] = {}
        for stored, tensor in tensors.items():
            name = self._renamed(stored)
            place, _, last = name.rpartition(".")
            if place == self.place and last in FUSED and tensor.dim() == 3:
                found |= {f"{place}.{key}.weight": part for key, part in self.split(last, tensor).items()}
            else:
                found[name] = tensor
        return found

    def shapes_apart(self, stored: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of the tensors that `apart` makes of one that is stored, the shapes by name."""
        name = self._renamed(stored)
        place, _, last = name.rpartition(".")
        if place != self.place or last not in FUSED or len(shape) != 3:
            return {name: shape}
        count, rows, width = shape
        gate, up, down = self.linears
        each = {down: (rows, width)} if last == "down_proj" else dict.fromkeys((gate, up), (rows // 2, width))
        return {f"{place}.{number}.{key}.weight": size for number in range(count) for key, size in each.items()}

    def _renamed(self, stored: str) -> str:
        return next((new + stored.removeprefix(old) for old, new in self.renamed if stored.startswith(old)), stored)

    def together(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block as transformers' own module takes them; `tensors` as `apart` gives them. A block
        without experts is as it was."""
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{self.place}.")}
        if not inside:
            return tensors
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
