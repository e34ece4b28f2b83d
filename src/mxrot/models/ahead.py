"""Tensors that predict tokens further ahead (multi-token prediction), beside a model that is complete without them.

GLM-4.5 and DeepSeek V3 have such decoder blocks behind the last, counted by `num_nextn_predict_layers`; others have
tensors of a name of their own, which transformers' class of the model says. It loads neither, and no more does vLLM
unless it speculates with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import transformers

from mxrot.models.family import Family

_KEY = "num_nextn_predict_layers"
_MARK = "mtp"
"""In transformers' patterns of names that it passes over."""
_MOST = 100
"""Decoder blocks of this kind; no model has more."""


@dataclass(frozen=True)
class Ahead:
    """Which tensors of a model are passed over."""

    blocks: str
    numbers: range
    """Of decoder blocks behind the last."""
    patterns: tuple[str, ...] = ()

    @classmethod
    def of(cls, family: Family, config: Any) -> Ahead:
        """Of a model, as its config and transformers' class say."""
        text = config.get_text_config()
        count, last = getattr(text, _KEY, None), text.num_hidden_layers
        count = count if type(count) is int and 0 < count <= _MOST else 0
        classes = (getattr(transformers, name, None) for name in family.architectures)
        found = (getattr(each, "_keys_to_ignore_on_load_unexpected", None) or () for each in classes)
        named = dict.fromkeys(pattern for patterns in found for pattern in patterns if _MARK in pattern)
        return cls(family.blocks, range(last, last + count), tuple(named))

    def holds(self, name: str) -> bool:
        """Is the tensor of this name in the model passed over?"""
        number, _, inner = name.removeprefix(f"{self.blocks}.").partition(".")
        if name.startswith(f"{self.blocks}.") and number.isdecimal() and inner:
            return int(number) in self.numbers
        return any(re.search(pattern, name) for pattern in self.patterns)

    def said(self, names: Iterable[str]) -> str:
        """One line on the tensors of these names that are passed over; empty for none."""
        found = sorted(names)
        if not found:
            return ""
        places = dict.fromkeys(self._place(name) for name in found)
        return (
            f"passed over, as transformers and vLLM do: {len(found)} tensors that predict tokens further ahead "
            f"({', '.join(places)})"
        )

    def _place(self, name: str) -> str:
        """What stands for several tensors: a decoder block, or the part of the name that says what they are."""
        parts = name.split(".")
        if name.startswith(f"{self.blocks}."):
            return ".".join(parts[: self.blocks.count(".") + 2])
        at = next((index for index, part in enumerate(parts) if _MARK in part), 0)
        return ".".join(parts[: at + 1])
