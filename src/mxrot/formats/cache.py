"""How the keys and values of attention are quantized: one row per token and head, in blocks along the head's width."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mxrot.errors import ConfigError
from mxrot.formats.quantizer import TensorQuantizer

CacheTransform = Literal["none", "hadamard", "stored"]
"""No transform; the Hadamard matrix of the head's width divided by its root, without random signs; or one matrix for
each head of keys and values, stored in the attention module."""


@dataclass(frozen=True)
class CacheScheme:
    """What attention reads of earlier tokens: Q(k T) and Q(v U), where k is taken after its norm and RoPE.

    Queries are multiplied by T^-T, and the output of a head by U^-1. Without Q the function stays the same. ConfigError
    for quantizers that cannot work row by row, and for values other than those listed here.
    """

    keys: TensorQuantizer
    values: TensorQuantizer
    first: int = 0
    """The number of tokens at the start of a sequence that are read in 16 bits."""
    last: int = 0
    """Query t reads key and value j in 16 bits if t - j < last."""
    key_transform: CacheTransform = "none"
    """The transform T."""
    value_transform: CacheTransform = "none"
    """The transform U, if it is applied at run time. A transform merged into the weights of the values is not listed
    here."""

    def __post_init__(self) -> None:
        for name, quantizer in self.by_name.items():
            rule = quantizer.rule
            if not rule.dynamic:
                raise ConfigError(f"cache: {name}: rule {rule.name!r} is for weights only")
            if any(part.per == "tensor" for part in quantizer.format.grid.parts(rule)):
                raise ConfigError(
                    f"cache: {name}: {quantizer.spelled} has a scale for a whole tensor, and tokens are kept one by "
                    "one; take another rule"
                )
        for name in ("first", "last"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ConfigError(f"cache: {name}: expected a number of tokens, 0 or more, got {count!r}")
        for name in ("key_transform", "value_transform"):
            if getattr(self, name) not in get_args(CacheTransform):
                known = ", ".join(get_args(CacheTransform))
                raise ConfigError(f"cache: {name}: expected one of {known}, got {getattr(self, name)!r}")

    @property
    def by_name(self) -> dict[str, TensorQuantizer]:
        """By their names in recipes and checkpoints."""
        return {"keys": self.keys, "values": self.values}

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The parameters of an attention module that hold its matrices, float32 [heads of keys and values, D, D]."""
        names = ("key_transform", "value_transform")
        return tuple(name for name in names if getattr(self, name) == "stored")

    @property
    def head_block(self) -> int:
        """The width of a head must be a multiple of this: it holds whole blocks, and its codes fill whole bytes."""
        formats = [quantizer.format for quantizer in self.by_name.values()]
        return math.lcm(*(format.block or 1 for format in formats), *(8 // math.gcd(8, one.bits) for one in formats))

    @property
    def spelled(self) -> str:
        """In words: "keys mxfp4 even under hadamard, values mxfp4 even"."""
        words = []
        for name, quantizer in self.by_name.items():
            transform = getattr(self, f"{name[:-1]}_transform")
            words.append(f"{name} {quantizer.spelled}" + ("" if transform == "none" else f" under {transform}"))
        kept = [f"the {name} {count}" for name, count in (("first", self.first), ("last", self.last)) if count]
        return ", ".join(words) + (f"; {' and '.join(kept)} tokens in 16 bit" if kept else "")
