"""How keys and values of attention are kept: one row for each token and head, in blocks along the width of a head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mxrot.errors import ConfigError
from mxrot.formats.quantizer import TensorQuantizer

CacheTransform = Literal["none", "hadamard", "stored"]
"""None; the Hadamard matrix of the width of a head divided by its root, without random signs; or one matrix for each
head of keys and values, which the attention module has."""


@dataclass(frozen=True)
class CacheScheme:
    """What attention reads of tokens before: Q(k T) and Q(v U), with k as it is after its norm and RoPE.

    A query is multiplied by T^-T, and what a head gives by U^-1: without Q the function stays. ConfigError for
    quantizers that rows by themselves cannot have, and for other values than those that are said here.
    """

    keys: TensorQuantizer
    values: TensorQuantizer
    first: int = 0
    """Tokens at the start of a sequence that are read in 16 bits."""
    last: int = 0
    """Query t reads key and value j in 16 bits where t - j < last."""
    key_transform: CacheTransform = "none"
    """T."""
    value_transform: CacheTransform = "none"
    """U, where it is applied at run time. What is merged into the weights beside the values does not stand here."""

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
        """As recipes and checkpoints call them."""
        return {"keys": self.keys, "values": self.values}

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The parameters of an attention module that hold its matrices, float32 [heads of keys and values, D, D]."""
        names = ("key_transform", "value_transform")
        return tuple(name for name in names if getattr(self, name) == "stored")

    @property
    def head_block(self) -> int:
        """What the width of a head must be a multiple of: whole blocks, and codes that fill whole bytes."""
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
