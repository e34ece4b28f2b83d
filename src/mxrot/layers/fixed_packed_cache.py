"""Packed keys and values of all positions, at fixed addresses: the `FixedCache` for attention with a quantized cache.

A CUDA graph can hold a step of it: the position of the next token is on the device, and nothing grows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from mxrot.kernels import CachedTokens, TokenRows, append_tokens, decode_attention
from mxrot.layers.fixed_exact_tokens import FixedExactTokens
from mxrot.layers.installed_cache import installed_cache
from mxrot.layers.kv_cache import recurrent_layers, states_in
from mxrot.layers.quantized_attention import seen_in


class FixedPackedLayer:
    """Keys and values of one attention module, and the newest token until attention packs it."""

    def __init__(self, cache: FixedPackedCache) -> None:
        self.cache = cache
        self.tokens: CachedTokens | None = None
        self.exact: FixedExactTokens | None = None
        self.new: tuple[Tensor, Tensor] | None = None

    def attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> Tensor:
        """Store the newest token of every sequence, then attend to the visible tokens: query and output [B, heads, 1,
        D]. `mask` [B, 1, 1, positions] hides some of them, as for PyTorch's own attention."""
        assert self.new is not None and self.cache.position is not None and query.shape[2] == 1
        (key, value), self.new = self.new, None
        if self.tokens is None:
            self.tokens = self._empty(module, key)
        position = self.cache.position
        seen = None if mask is None else seen_in(mask)[:, 0, 0].expand(len(query), -1)
        if self.exact is None:
            turned = append_tokens(query, key, value, self.tokens, position)
            return decode_attention(turned, self.tokens, self.cache.visible, seen, scaling, softcap)
        exact = self.exact.read_by(query)
        turned = append_tokens(query, key, value, self.tokens, position, exact, seen)
        return decode_attention(turned, self.tokens, position, seen, scaling, softcap, exact)

    def _empty(self, module: nn.Module, key: Tensor) -> CachedTokens:
        installed = installed_cache(module)
        assert installed is not None
        batch, heads, _, width = key.shape
        if installed.scheme.first or installed.scheme.last:
            self.exact = FixedExactTokens(installed.scheme, key)
        keys, values = (
            TokenRows.empty(quantizer, batch, heads, self.cache.positions, width, key.device)
            for quantizer in (installed.scheme.keys, installed.scheme.values)
        )
        return CachedTokens(keys, values, installed.matrices(module, width, key.device, torch.float32))


class FixedPackedCache(Cache):
    """Takes one token per call. Attention sees the first `visible` tokens.

    If a scheme keeps tokens in 16 bits, attention sees those up to `position`, and tokens must come in order.
    """

    def __init__(self, positions: int, config: Any = None) -> None:  # sets its own layers, without Cache's setup
        """`config` is as for `FixedCache`."""
        self.layers = recurrent_layers(config)
        self.positions = self.visible = positions
        self.position: Tensor | None = None
        """The position of the next token, int64 [1]."""
        self._kept: dict[int, FixedPackedLayer] = {}

    @property
    def is_filled(self) -> bool:
        """True if the tensors of keys and values are allocated."""
        return bool(self.kept)

    @property
    def kept(self) -> list[CachedTokens]:
        """The packed tokens of all layers that were called."""
        return [layer.tokens for layer in self._kept.values() if layer.tokens is not None]

    @property
    def kept_exact(self) -> list[FixedExactTokens]:
        """The 16-bit tokens of these layers, if they keep any."""
        return [layer.exact for layer in self._kept.values() if layer.exact is not None]

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values of all positions, with their scales, 16-bit tokens and states."""
        exact = sum(kept.nbytes for kept in self.kept_exact) + sum(state.nbytes for state in states_in(self.layers))
        return exact + sum(tokens.keys.nbytes + tokens.values.nbytes for tokens in self.kept)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Note the keys and values [B, heads, 1, width] of a layer. Returns the layer itself, twice, for attention to
        read."""
        layer = self._kept.setdefault(layer_idx, FixedPackedLayer(self))
        layer.new = key_states, value_states
        return layer, layer

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0
