"""What the cache of one sequence takes, counted: keys and values in 16 bits or as a scheme keeps them, and states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mxrot.formats import CacheScheme
from mxrot.layers.installed_cache import cache_scheme_of
from mxrot.models import Family, cached_numbers, value_heads
from mxrot.models.positions import block_windows, position_count

_PLAIN_BYTES = 2
"""Of an element that is not quantized."""


@dataclass(frozen=True)
class CacheSize:
    """Sizes of a model's cache, for one sequence."""

    windows: tuple[int | None, ...]
    """Of each decoder block the tokens that it looks back at; None for all, 0 without attention."""
    heads: int
    """Of keys, and as many of values."""
    width: int
    """Of a head."""
    positions: int | None
    """Tokens that the model was made for; None where its config does not say."""
    numbers: tuple[int, ...]
    """Of each token in each decoder block, in a cache that is not quantized."""
    scheme: CacheScheme | None = None
    """None for 16 bits."""
    states: tuple[int, int] = (0, 0)
    """Numbers beside keys and values, as of `Family.states_of`."""

    @staticmethod
    def of(config: Any, family: Family, scheme: CacheScheme | None) -> CacheSize:
        """Of a model by its config alone."""
        text = config.get_text_config()
        windows, positions = block_windows(config, family), position_count(config)
        states = (0, 0) if family.states_of is None else family.states_of(text)
        return CacheSize(windows, *value_heads(text), positions, cached_numbers(text, family), scheme, states)

    @property
    def bits_per_element(self) -> float:
        """Mean over a key and a value that are quantized, of codes and what stands beside them."""
        return bits_per_element(self.scheme, self.width)

    def bytes_at(self, tokens: int) -> int:
        """Of so many tokens: codes and what stands beside them, and in 16 bits the first ones and those that the next
        query still reads so, and states. Room that is held ready for tokens to come is not in it."""
        rows = [tokens if window is None else min(tokens, window) for window in self.windows]
        counts = zip(rows, self.numbers, strict=True)
        return sum(self._bytes_of_block(count, numbers) for count, numbers in counts) + self.state_bytes(_PLAIN_BYTES)

    def state_bytes(self, itemsize: int) -> int:
        """Of what does not grow with the sequence, in a model that computes in a type of so many bytes."""
        own, exact = self.states
        return own * itemsize + exact * torch.float32.itemsize

    def bytes_without_windows(self, tokens: int, itemsize: int) -> int:
        """Of a cache that is not quantized and keeps so many tokens in each block that attends."""
        of_token = sum(one for one, window in zip(self.numbers, self.windows, strict=True) if window != 0)
        return of_token * tokens * itemsize + self.state_bytes(itemsize)

    def _bytes_of_block(self, tokens: int, numbers: int) -> int:
        plain = numbers * _PLAIN_BYTES
        if self.scheme is None:
            return tokens * plain
        kept = (self.scheme.keys, self.scheme.values)
        packed = sum(sum(one.stored_bytes(tokens * self.heads, self.width)) for one in kept)
        exact = min(tokens, self.scheme.first) + min(tokens, max(0, self.scheme.last - 1))
        return packed + exact * plain

    def as_table(self, lengths: tuple[int, ...] = (8192,)) -> dict[str, Any]:
        """Bits an element, and bytes of a sequence at so many tokens and at all positions, beside those in 16 bits."""
        counts = dict.fromkeys((*lengths, *(() if self.positions is None else (self.positions,))))
        plain = replace(self, scheme=None)
        return {
            "scheme": None if self.scheme is None else self.scheme.spelled,
            "bits_per_element": self.bits_per_element,
            "bytes": {str(count): self.bytes_at(count) for count in counts},
            "bytes_in_16_bit": {str(count): plain.bytes_at(count) for count in counts},
        }


def bits_per_element(scheme: CacheScheme | None, width: int) -> float:
    """The mean over a key and a value [width] that are quantized, with what stands beside the codes; 16 without."""
    if scheme is None:
        return 8.0 * _PLAIN_BYTES
    return sum(8 * sum(one.stored_bytes(1, width)) for one in (scheme.keys, scheme.values)) / (2 * width)


def cache_of(model: nn.Module) -> CacheScheme | None:
    """How a model keeps keys and values, which is the same in all decoder blocks; None for as they are."""
    return next((found for module in model.modules() if (found := cache_scheme_of(module)) is not None), None)
