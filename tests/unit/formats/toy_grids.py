"""Grids that the catalog does not have, each one class: what a grid must bring, and nothing else."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats import Format, Grid, NamedParts, Parts, PartSpec, ScaleRule
from mxrot.formats.element import E2M1, Element


@dataclass(frozen=True)
class TwoScales(Grid):
    """One scale for numbers above 0, another one for those below."""

    element: Element

    @property
    def bits(self) -> int:
        return self.element.bits

    def parts(self, rule: ScaleRule) -> tuple[PartSpec, ...]:
        return tuple(PartSpec(name, torch.float8_e5m2, 8) for name in ("scale", "negative_scale"))

    def choose(self, blocks: Tensor, rule: ScaleRule) -> NamedParts:
        largest = {"scale": blocks.clamp(min=0).amax(dim=-1), "negative_scale": (-blocks).clamp(min=0).amax(dim=-1)}
        return NamedParts(
            {
                name: (top / self.element.max + _poison(blocks)).clamp(min=2.0**-14).to(torch.float8_e5m2)
                for name, top in largest.items()
            }
        )

    def encode(self, blocks: Tensor, parts: Parts) -> Tensor:
        return self.element.encode(blocks / self._scales(blocks > 0, parts, blocks.dtype))

    def decode(self, codes: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        values = self.element.decode(codes, dtype)
        return values * self._scales(values > 0, parts, dtype)

    def _scales(self, is_above: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        above, below = (parts.tensors[name].to(dtype)[..., None] for name in ("scale", "negative_scale"))
        return torch.where(is_above, above, below)


@dataclass(frozen=True)
class Codebook(Grid):
    """Levels of a block's own, evenly spaced here: what counts is that they are stored."""

    @property
    def bits(self) -> int:
        return 2

    def parts(self, rule: ScaleRule) -> tuple[PartSpec, ...]:
        return (PartSpec("level", torch.float16, 16, shape=(4,)),)

    def choose(self, blocks: Tensor, rule: ScaleRule) -> NamedParts:
        low, high = (ends[..., None] for ends in blocks.aminmax(dim=-1))
        steps = torch.arange(4, dtype=blocks.dtype, device=blocks.device) / 3
        return NamedParts({"level": (low + (high - low) * steps + _poison(blocks)[..., None]).to(torch.float16)})

    def encode(self, blocks: Tensor, parts: Parts) -> Tensor:
        levels = parts.tensors["level"].to(blocks.dtype)[..., None, :]
        return (blocks[..., None] - levels).abs().argmin(dim=-1).to(torch.uint8)

    def decode(self, codes: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        return parts.tensors["level"].to(dtype).gather(-1, codes.long())


def _poison(blocks: Tensor) -> Tensor:
    """0, or NaN for a block that holds NaN or Inf."""
    return (blocks - blocks).sum(dim=-1)


TWO_SCALES = Format("two_scales", TwoScales(E2M1), 32, ("absmax",))
CODEBOOK = Format("codebook", Codebook(), 16, ("absmax",))
