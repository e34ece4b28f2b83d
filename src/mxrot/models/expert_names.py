"""How the experts of a mixture are called, together as transformers has them and apart as checkpoints do.

transformers computes the experts of a block with two tensors, [E, 2I, H] and [E, H, I], which some architectures
transpose, and give biases [E, 2I] and [E, H]; checkpoints hold three linears an expert. Without gates the first tensor
is [E, I, H], and an expert has two linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mxrot.errors import FamilyError
from mxrot.models.site import Site

DENSE, SPARSE = "dense", "sparse"
"""Kinds of decoder blocks, where some have a plain MLP in the place of experts."""


@dataclass(frozen=True)
class ExpertNames:
    """How the experts of an architecture are called."""

    fused: str
    """transformers' class that holds all experts of a block."""
    count: str
    """What the config calls the number of experts."""
    linears: tuple[str, ...]
    """gate, up and down of an expert, as checkpoints call them; up and down where there is no gate."""
    place: str = "mlp.experts"
    """Where experts are in a block."""
    routers: tuple[str, ...] = ("mlp.gate",)
    """Modules that say which experts a token goes to, and how much each counts; they read what experts read."""
    norm_adds_one: bool = False
    """Does the norm before experts multiply by 1 + its weight?"""
    shared: str | None = None
    """The expert that every token goes to beside the others, by its name in a block."""
    shared_count: str | None = None
    """What the config calls the number of those, where a model may have none."""
    shared_linears: tuple[str, ...] = ()
    """What that one calls its linears, where not as the others do; gate and up may be one."""
    may_lack: bool = False
    """May a model have no block with them, where no kind of its blocks says that they have plain MLPs?"""
    norm: str = "post_attention_layernorm"
    """Whose output they and the routers read."""
    narrow: tuple[str, str] | None = None
    """Linears before and behind the experts, where these compute in fewer channels; the shared one does not."""
    narrow_width: str = ""
    """What the config calls their number; None there for no such linears."""
    gated: Literal["product", "clamped", "none"] = "product"
    """What down reads: act(gate) * up, the same of values within bounds, with 1 + up, or act(up) (`layers/gates.py`).
    """
    has_bias: bool = False
    """Has each linear of an expert a bias?"""
    is_transposed: bool = False
    """Are transformers' two tensors [E, H, 2I] and [E, I, H]?"""
    is_interleaved: bool = False
    """Are the rows of gate and up there one of gate and one of up, in turns? Else those of gate come first."""
    each: str = "num_experts_per_tok"
    """What the config calls the number of experts that a token goes to."""
    prefix: str = ""
    """How the names of their sites begin, where a block has a plain MLP beside them."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Starts of names in a block in older checkpoints, and what they are in the model."""

    def sites(self, config: Any) -> tuple[Site, ...]:
        """One site for gate and up of all experts, and one for down of each; the shared one is the last of them. Where
        experts compute in fewer channels, the shared one and the linear before them read another tensor than they do.

        FamilyError if a token cannot be sent to as many experts as the config says.
        """
        count, each = getattr(config, self.count), getattr(config, self.each)
        if not 1 <= each <= count:
            raise FamilyError(f"config.json: expected 1 to {count} experts a token (of {self.count}), got {each}")
        experts = [f"{self.place}.{number}" for number in range(count)]
        shared = () if self.shared is None or not self._count_of_shared(config) else (self.shared,)
        of_shared = self.shared_linears or self.linears
        shared_downs = tuple(self._down("shared_down", expert, linears=of_shared) for expert in shared)
        kind = f"{self.prefix}down"
        downs = tuple(self._down(f"{kind}_{number}", expert, kind=kind) for number, expert in enumerate(experts))
        name = self.prefix + ("up" if len(self.before) == 1 else "gate_up")
        if self.narrow is not None and getattr(config, self.narrow_width) is not None:
            first, last = self.narrow
            return (
                Site(
                    name,
                    (first, *self._that_read(shared, of_shared)),
                    norm=self.norm,
                    norm_adds_one=self.norm_adds_one,
                    routers=self.routers,
                ),
                Site(f"expert_{name}", self._that_read(experts), producer=first, experts=self.place, is_added=False),
                *(replace(down, is_added=False) for down in downs),
                Site("widen", (last,)),
                *(replace(down, expert=None) for down in shared_downs),
            )
        read = (*self._that_read(experts), *self._that_read(shared, of_shared))
        return (
            Site(
                name,
                read,
                norm=self.norm,
                norm_adds_one=self.norm_adds_one,
                experts=self.place,
                routers=self.routers,
            ),
            *downs,
            *shared_downs,
        )

    @property
    def before(self) -> tuple[str, ...]:
        """What an expert has before down: gate and up, or up."""
        return self.linears[:-1]

    @property
    def fused_names(self) -> tuple[str, str]:
        """What transformers calls its two tensors."""
        return ("up_proj" if len(self.before) == 1 else "gate_up_proj", "down_proj")

    def _that_read(self, experts: Sequence[str], linears: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The linears of experts that read what these read."""
        return tuple(f"{expert}.{name}" for expert in experts for name in (linears or self.linears)[:-1])

    def _down(self, name: str, expert: str, kind: str = "", linears: tuple[str, ...] = ()) -> Site:
        """The site of down of an expert."""
        own = linears or self.linears
        up, down = (f"{expert}.{linear}" for linear in own[-2:])
        passes = self.gated == "product" and len(own) == len(self.linears)
        before = None if passes else up
        return Site(name, (down,), producer=up if passes else None, rows_before=before, expert=expert, kind=kind)

    def _count_of_shared(self, config: Any) -> int:
        return 1 if self.shared_count is None else int(getattr(config, self.shared_count))

    def share(self, config: Any, linear: str) -> float:
        """Of the tokens, that a linear of an expert gets, by its name in a block."""
        if not linear.startswith(f"{self.place}."):
            return 1.0
        return float(getattr(config, self.each) / getattr(config, self.count))

    def apart(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block with one for each linear, whichever way they are stored."""
        found: dict[str, Tensor] = {}
        for stored, tensor in tensors.items():
            name = self._renamed(stored)
            if self._is_fused(name, tensor.dim()):
                place, _, last = name.rpartition(".")
                found |= {f"{place}.{key}": part for key, part in self.split(last, tensor).items()}
            else:
                found[name] = tensor
        return found

    def shapes_apart(self, stored: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of the tensors that `apart` makes of one that is stored, the shapes by name."""
        name = self._renamed(stored)
        if not self._is_fused(name, len(shape)):
            return {name: shape}
        place, _, last = name.rpartition(".")
        count, *each = shape
        base, kind = _kind_of(last)
        rows, *inputs = each[::-1] if self.is_transposed else each
        is_down = base == "down_proj"
        own = {self.linears[-1]: rows} if is_down else dict.fromkeys(self.before, rows // len(self.before))
        return {
            f"{place}.{number}.{linear}.{kind}": (size, *inputs)
            for number in range(count)
            for linear, size in own.items()
        }

    def _is_fused(self, name: str, dimensions: int) -> bool:
        """Is it one of transformers' tensors of all experts?"""
        place, _, last = name.rpartition(".")
        base, kind = _kind_of(last)
        return place == self.place and base in self.fused_names and dimensions == (3 if kind == "weight" else 2)

    def _renamed(self, stored: str) -> str:
        return next((new + stored.removeprefix(old) for old, new in self.renamed if stored.startswith(old)), stored)

    def together(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block as transformers' own module takes them; `tensors` as `apart` gives them. A block
        without experts is as it was."""
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{self.place}.")}
        if not inside:
            return tensors
        found = {name: tensor for name, tensor in tensors.items() if name not in inside}
        for kind in self.kinds:
            found |= {f"{self.place}.{name}": tensor for name, tensor in self._whole(inside, kind).items()}
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the tensors of a linear are called."""
        return ("weight", "bias") if self.has_bias else ("weight",)

    def _whole(self, inside: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
        """transformers' two tensors of the weights, or of the biases."""
        count = len(inside) // (len(self.linears) * len(self.kinds))
        try:
            *before, down = (
                torch.stack([inside[f"{self.place}.{number}.{name}.{kind}"] for number in range(count)])
                for name in self.linears
            )
        except KeyError as error:
            raise FamilyError(f"no tensor ends with {error.args[0]}; is the download complete?") from error
        first = torch.stack(before, dim=2).flatten(1, 2) if self.is_interleaved else torch.cat(before, dim=1)
        whole = dict(zip(self.fused_names, (first, down), strict=True))
        if kind == "bias":
            return {f"{name}_bias": x for name, x in whole.items()}
        return {name: x.mT.contiguous() if self.is_transposed else x for name, x in whole.items()}

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What linears have of transformers' tensor `name` of all experts, as copies, by number, name and kind."""
        base, kind = _kind_of(name)
        whole = tensor.mT if self.is_transposed and kind == "weight" else tensor
        if base == "down_proj":
            return {f"{number}.{self.linears[-1]}.{kind}": _copy(one) for number, one in enumerate(whole)}
        return {
            f"{number}.{linear}.{kind}": _copy(half)
            for number, one in enumerate(whole)
            for linear, half in zip(self.before, self._parts(one), strict=True)
        }

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Those of gate, where there is one, and those of up."""
        return (rows[::2], rows[1::2]) if self.is_interleaved else rows.chunk(len(self.before))


def _kind_of(name: str) -> tuple[str, str]:
    """Of the last part of a name of transformers, that of its weights, and whether it is of weights or biases."""
    base = name.removesuffix("_bias")
    return base, "weight" if base == name else "bias"


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
