"""A cache for transformers with packed keys and values.

`update` receives keys and values after RoPE, but not the query or the mask. Attention needs both: the query is
multiplied by the inverse transform, and `first` counts from the first token that is not padding. `update` therefore
only notes the new tokens and returns the layer in place of keys and values. The attention function
(`layers.cached_attention`) makes the layer `take` them, and reads from it.

In 16 bits a layer keeps the first tokens and the newest `last - 1`, which later queries read in 16 bits, and a few
more, so that drafts can be cropped. `activate_past_recording` keeps all tokens until `crop`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from mxrot.errors import ConfigError
from mxrot.formats import CacheScheme
from mxrot.kernels import CacheMatrices
from mxrot.layers.installed_cache import cache_scheme_of, turned
from mxrot.layers.kv_cache import states_in
from mxrot.layers.packed_tokens import PackedTokens
from mxrot.layers.recent_tokens import Pair, RecentTokens

TAKEN_BACK = 24
"""The number of newest tokens that can be cropped if `last` is used and no past is recorded."""


class PackedCacheLayer(CacheLayerMixin):
    """Keys and values of one attention module."""

    is_compileable = False
    is_croppable = True
    keys: PackedTokens  # type: ignore[assignment]
    values: PackedTokens  # type: ignore[assignment]

    def __init__(self, scheme: CacheScheme, sliding_window: int | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self.sliding_window = sliding_window
        self.record_past = False
        self.reset()

    @property
    def is_sliding(self) -> bool:
        return self.sliding_window is not None

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors that are kept."""
        leading = 0 if self.leading is None else sum(tensor.nbytes for tensor in self.leading)
        return self.keys.nbytes + self.values.nbytes + self.recent.nbytes + leading

    def reset(self) -> None:
        self.keys, self.values = PackedTokens(self.scheme.keys), PackedTokens(self.scheme.values)
        self.tokens = 0
        """The number of tokens so far, including those that have left a window."""
        self.new: Pair | None = None
        """The tokens given to `update` that `take` has not taken yet."""
        self.recent = RecentTokens()
        """The newest tokens, unquantized."""
        self.leading: Pair | None = None
        """The `first` tokens of each sequence, unquantized; zeros for tokens that have not come yet."""
        self.padding: Tensor | None = None
        """The number of padding tokens at the start of each sequence, int64 [B]. All tokens so far if only padding was
        seen."""
        self._ask_from = 0
        """With fewer tokens than this, some sequence still lacks its first tokens."""
        self._complete: int | None = None
        """With at least this many tokens, no sequence lacks any. None until this was seen."""
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Note new keys and values [B, heads, n, D]. Returns the layer itself, twice, for the attention function to
        read.

        ConfigError if a gradient would have to pass through packed tokens.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ConfigError(
                "no gradient passes a cache of packed keys and values; call the model under torch.no_grad(), or with "
                "use_cache=False, where they are quantized with a straight-through gradient"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.new is None, "keys and values that no attention function has read"
        self.new = key_states, value_states
        self.tokens += key_states.shape[2]
        return self, self

    @property
    def visible(self) -> int:
        """The number of newest keys that the queries of this call see, as `get_mask_sizes` said."""
        window = self.keys.length if self.sliding_window is None else self.sliding_window - 1 + self._call
        return min(self.keys.length, window)

    def take(self, matrices: CacheMatrices) -> None:
        """Pack the new tokens."""
        assert self.new is not None
        (key, value), self.new = self.new, None
        self._call = key.shape[2]
        self.keys.append(turned(key, matrices.keys))
        self.values.append(turned(value, matrices.values))
        if self.scheme.last or self.scheme.first:
            self.recent.append(key, value)

    def take_by(self, pack: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Let `pack` write the key and value of one token at the end of the tokens, which must have room, and with
        `last` into the ring of the newest, where room is made here. Returns what `pack` returns."""
        assert self.new is not None and self.has_first
        (key, value), self.new = self.new, None
        self._call = key.shape[2]
        if self.scheme.last:
            self.recent.reserve(1, (key, value))
        found = pack(key, value)
        if self.scheme.last:
            self.recent.written(1)
        for tokens in (self.keys, self.values):
            tokens.length += self._call
        return found

    @property
    def has_first(self) -> bool:
        """True if all `first` tokens of all sequences came before the new ones. Synchronizes with the device until they
        have."""
        assert self.new is not None
        before = self.tokens - self.new[0].shape[2]
        if not self.scheme.first:
            return True
        if self.padding is None or before < self._ask_from:
            return False
        if self._complete is None:
            needed = int(self.padding.max()) + self.scheme.first
            if needed > before:
                self._ask_from = needed
                return False
            self._complete = needed
        return before >= self._complete

    def note_padding(self, padding: Tensor | None) -> None:
        """Keep the new tokens that are among the `first`. `padding` is as the attribute, None if this call has no
        padding."""
        recent, count = self.recent.read(0, self.recent.length), self.scheme.first
        batch, heads, held, _ = recent[0].shape
        start = self.tokens - self._call
        if padding is None:
            padding = torch.full((batch,), start, device=recent[0].device)
        # If only padding was seen so far, this call knows more.
        self.padding = padding if self.padding is None else torch.where(self.padding < start, self.padding, padding)
        if self.leading is None:
            self.leading = tuple(x.new_zeros(batch, heads, count, x.shape[3]) for x in recent)  # type: ignore[assignment]
            assert self.leading is not None
        places = self.padding[:, None] + torch.arange(count, device=self.padding.device)
        is_new = ((places >= start) & (places < self.tokens))[:, None, :, None]
        index = (places - (self.tokens - held)).clamp(0, held - 1)[:, None, :, None]
        kept = [
            torch.where(is_new, x.gather(2, index.expand(-1, heads, -1, x.shape[3])), old)
            for x, old in zip(recent, self.leading, strict=True)
        ]
        self.leading = kept[0], kept[1]

    def trim(self) -> None:
        """Drop what no later query reads."""
        if self.record_past:
            return
        if self.sliding_window is not None:
            self._keep_window()
        self._keep_recent(self.scheme.last - 1 + TAKEN_BACK)

    def _keep_window(self) -> None:
        assert self.sliding_window is not None
        for tokens in (self.keys, self.values):
            tokens.drop_first(max(0, tokens.length - self.sliding_window + 1))
            tokens.shrink()

    def _keep_recent(self, tokens: int) -> None:
        # With last = 1 a query reads only itself in 16 bits, and it is among the new tokens.
        self.recent.keep(0 if self.scheme.last < 2 else tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys for a call with this many queries, and the number of tokens before them."""
        kept = self.tokens if self.sliding_window is None else min(self.tokens, self.sliding_window - 1)
        return kept + query_length, self.tokens - kept

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Keep all tokens until `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens. A negative number is the number to forget. A positive number is the number to keep,
        as in transformers until 5.17. RuntimeError if the earlier tokens are no longer kept."""
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.tokens - tokens_to_remove)
        removed = min(removed, self.tokens)
        left = self.tokens - removed
        needed = left if self.sliding_window is None else min(left, self.sliding_window - 1)
        exact = min(self.scheme.last - 1, needed)
        if removed and (self.keys.length - removed < needed or (exact > 0 and self.recent.length - removed < exact)):
            raise RuntimeError(
                f"crop of {removed} tokens: what attention reads before them is no longer kept; call "
                "activate_past_recording() on the cache before the tokens come"
            )
        for tokens in (self.keys, self.values):
            tokens.drop_last(removed)
        self.tokens = left
        self.recent.drop_last(removed)
        if self._complete is None or left < self._complete:
            self._ask_from, self._complete = 0, None
        if self.record_past:
            if self.sliding_window is not None:
                self._keep_window()
            self._keep_recent(self.scheme.last - 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, given by indices or flags."""
        if not self.tokens:
            return
        indices = torch.as_tensor(indices, device=self.device)
        places = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._of_batch(places)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tokens:
            batch = self.keys.buffers["codes"].shape[0]
            self._of_batch(torch.arange(batch, device=self.device).repeat_interleave(repeats))

    def _of_batch(self, places: Tensor) -> None:
        for tokens in (self.keys, self.values):
            tokens.select(places)
        self.recent.select(places)
        if self.leading is not None:
            self.leading = self.leading[0].index_select(0, places), self.leading[1].index_select(0, places)
        self.padding = None if self.padding is None else self.padding.index_select(0, places)

    def offload(self) -> None:
        """Does nothing: attention reads the layer after a cache has offloaded it."""

    def prefetch(self) -> None:
        """Does nothing."""


class PackedCache(Cache):
    """Keys and values of a model, packed for the attention modules that quantize them."""

    @staticmethod
    def of(model: PreTrainedModel) -> PackedCache:
        """An empty cache for a transformers model. ConfigError if none of its modules quantizes its cache."""
        like = DynamicCache(config=model.config)
        for module in model.modules():
            if cache_scheme_of(module) is not None:
                pack_layer(like, module)
        if not isinstance(like, PackedCache):
            raise ConfigError("no attention module of this model quantizes its keys and values; take DynamicCache")
        return like

    @property
    def nbytes(self) -> int:
        """The bytes of keys, values and states of all layers, with scales and 16-bit tokens."""
        return sum(_bytes_of(layer) for layer in self.layers)


def pack_layer(cache: Any, attention: nn.Module) -> None:
    """Replace an attention module's layer in a `DynamicCache` or `PackedCache` by a packed one, if the layer is empty.
    The cache becomes a `PackedCache`. Layers that transformers offloads do not change."""
    scheme = cache_scheme_of(attention)
    if scheme is None or type(cache) not in (DynamicCache, PackedCache) or cache.offloading:
        return
    index: int = attention.layer_idx  # type: ignore[assignment]
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, PackedCacheLayer) or layer.get_seq_length():
        return
    packed = PackedCacheLayer(scheme, getattr(layer, "sliding_window", None))
    packed.record_past = getattr(layer, "record_past", False)
    cache.layers[index] = packed
    cache.__class__ = PackedCache


def _bytes_of(layer: Any) -> int:
    if isinstance(layer, PackedCacheLayer):
        return layer.nbytes
    plain = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(x.nbytes for x in (*plain, *states_in([layer])) if isinstance(x, Tensor))
