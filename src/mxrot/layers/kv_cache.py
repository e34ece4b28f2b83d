"""Keys and values of the tokens so far, as attention reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin


def recurrent_layers(config: Any) -> list[Any]:
    """transformers' own cache layers for a model of this config, by the number of the block, where some of its blocks
    have a state in the place of keys and values; none in other models, and without a config."""
    layers = [] if config is None else DynamicCache(config=config.get_text_config()).layers
    return layers if any(isinstance(one, LinearAttentionCacheLayerMixin) for one in layers) else []


def states_in(layers: Iterable[Any]) -> list[Tensor]:
    """The states of recurrent blocks that were called."""
    recurrent = [layer for layer in layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
    kinds = [states for layer in recurrent for states in (layer.conv_states, layer.recurrent_states)]
    return [tensor for states in kinds for tensor in states.values() if tensor is not None]


class FixedCache(Cache):
    """Keys and values of all positions, at addresses that stay; attention sees the first `visible` ones.

    Of a model with recurrent blocks, its `config` says which they are; transformers' own layers keep their states.
    """

    def __init__(self, positions: int, config: Any = None) -> None:  # without what Cache sets up: layers of its own
        self.layers = recurrent_layers(config)
        self.positions = self.visible = positions
        self.position: Tensor | None = None
        """int64 [1], where the next token goes."""
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._of_indexers: dict[int, Tensor] = {}

    @property
    def is_filled(self) -> bool:
        """Do keys and values have their addresses?"""
        return bool(self._kept)

    @property
    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [S, heads, positions, width] of all layers that were called."""
        return list(self._kept.values())

    @property
    def nbytes(self) -> int:
        """Of keys and values of all positions, of keys of indexers, and of states."""
        others = (*self._of_indexers.values(), *states_in(self.layers))
        return sum(keys.nbytes + values.nbytes for keys, values in self.kept) + sum(one.nbytes for one in others)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Keep the keys and values [S, heads, 1, width] of a layer; all visible ones, [S, heads, visible, width]."""
        assert self.position is not None
        if layer_idx not in self._kept:
            self._kept[layer_idx] = self._empty(key_states), self._empty(value_states)
        keys, values = self._kept[layer_idx]
        keys.index_copy_(2, self.position, key_states)
        values.index_copy_(2, self.position, value_states)
        return keys[:, :, : self.visible], values[:, :, : self.visible]

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Keep the keys [S, 1, width] of the indexer of a layer; all visible ones, [S, visible, width]."""
        assert self.position is not None
        if layer_idx not in self._of_indexers:
            count, _, width = indexer_key_states.shape
            self._of_indexers[layer_idx] = indexer_key_states.new_zeros(count, self.positions, width)
        keys = self._of_indexers[layer_idx]
        keys.index_copy_(1, self.position.to(keys.device), indexer_key_states)
        return keys[:, : self.visible]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(*like.shape[:2], self.positions, like.shape[-1])

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0


class SpreadCache(FixedCache):
    """The same for blocks that are on several devices: keys and values lie where their block computes."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Keep the keys and values of a layer on their device; all visible ones."""
        assert self.position is not None
        self.position = self.position.to(key_states.device)
        return super().update(key_states, value_states, layer_idx)
