"""Attention that reads quantized keys and values: Q(k T) and Q(v U), with q T^-T and a head's output times U^-1.

This is an attention function for transformers. An attention module calls it after `quantize_cache` has given it a
scheme and its own config, so the original model may run beside it on the same config. When its module is called, an
empty layer of a `DynamicCache` becomes a packed layer (`layers.packed_cache`). `model.generate`, and every call of the
model under `torch.no_grad()`, therefore reads packed keys and values from the first call on. Without a cache, with
gradients, and with other caches of transformers, keys and values are quantized here in every call. The values are the
same, and the gradient is that of unrounded values.

The positions of a query and a key alone decide whether the query reads the key in 16 bits. A text in one pass, in
pieces, or token by token therefore gives the same result, up to the order of sums. Padding is what the mask hides at
the start of a sequence.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from mxrot.errors import ConfigError
from mxrot.formats import CacheScheme
from mxrot.kernels import CacheMatrices
from mxrot.layers.attention import OPERANDS
from mxrot.layers.fixed_packed_cache import FixedPackedLayer
from mxrot.layers.installed_cache import INSTALLED, InstalledCache, installed_cache, turned
from mxrot.layers.packed_cache import PackedCacheLayer, pack_layer
from mxrot.layers.packed_decoding import decode_packed
from mxrot.layers.quantized_attention import KNOWN_MASKS, rounded, seen_in
from mxrot.layers.sliced_attention import Call, Reading, attend
from mxrot.layers.trained_attention import is_trained, trained_attention
from mxrot.layers.transform import keeping_type

CACHED = "mxrot_cached_attention"
_HOOK = "quantized_cache_hook"


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedCacheLayer | FixedPackedLayer,
    value: Tensor | PackedCacheLayer | FixedPackedLayer,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of a query [batch, heads, tokens, width]: output [batch, tokens, heads, width], in the type of the
    query.

    Keys and values have as many heads or fewer; a `PackedCacheLayer` may take their place. `attention_mask` is as for
    PyTorch's own attention or transformers' eager one: flags, or numbers to add, [batch, 1, tokens, keys]. Without a
    mask a single query sees all keys, and each of several queries sees one key more than the query before it. Windows
    are given as masks. ConfigError for dropout and sinks, and in a model that makes other masks.
    """
    installed = installed_cache(module)
    assert installed is not None
    _check_call(installed.before._attn_implementation, dropout, more)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, FixedPackedLayer):
        found = key.attend(module, query, attention_mask, scaling, softcap)
        return found.transpose(1, 2).contiguous(), None
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    matrices = installed.matrices(module, query.shape[-1], query.device, work)
    if is_trained(installed.scheme, (query, key, value), softcap):
        assert isinstance(key, Tensor) and isinstance(value, Tensor)
        return trained_attention(installed.scheme, matrices, (query, key, value), attention_mask, scaling), None
    with torch.autocast(query.device.type, enabled=False):
        if isinstance(key, PackedCacheLayer):
            decoded = decode_packed(key, matrices, query, attention_mask, scaling, softcap)
            if decoded is not None:
                return decoded.transpose(1, 2).contiguous(), None
            key.take(matrices)
            count, are_last = key.visible, True
        else:
            assert isinstance(value, Tensor)
            if attention_mask is None and query.shape[2] > 1:
                key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]  # later keys are not filled yet
            count, are_last = key.shape[2], attention_mask is None
        mask = None if attention_mask is None else attention_mask[..., :count]
        call = Call(
            (query.to(work) * scaling).unflatten(1, (_kept_heads(key), -1)),
            matrices,
            mask,
            _places(query, mask, count, are_last),
            are_last,
            softcap,
        )
        reading: Reading
        if isinstance(key, PackedCacheLayer):
            if installed.scheme.first:
                key.note_padding(None if mask is None else _padding(mask, len(query)) + key.tokens - count)
            reading = _PackedReading(key, work)
        else:
            assert isinstance(value, Tensor)
            _check_window(installed.scheme, query.shape[2], count, more.get("sliding_window"))
            reading = _GivenReading(installed.scheme, matrices, key.to(work), value.to(work), mask)
        found = attend(call, reading, installed.scheme)
        if isinstance(key, PackedCacheLayer):
            key.trim()
    return found.to(query.dtype).transpose(1, 2).contiguous(), None


def _kept_heads(key: Tensor | PackedCacheLayer) -> int:
    return key.keys.codes.shape[1] if isinstance(key, PackedCacheLayer) else key.shape[1]


def _check_call(masks: str | None, dropout: float, more: dict[str, Any]) -> None:
    wrong = ["sinks"] if more.get("s_aux") is not None else []
    wrong += ["dropout"] if dropout else []
    wrong += [] if masks in KNOWN_MASKS else [f"masks of attn_implementation={masks!r}"]
    if wrong:
        raise ConfigError(
            f"attention with a quantized cache knows no {', '.join(wrong)}; take attn_implementation='sdpa' and the "
            "model as it comes, or a recipe without [cache]"
        )


def _check_window(scheme: CacheScheme, queries: int, keys: int, window: int | None) -> None:
    if scheme.first and window is not None and queries < keys and window <= keys:
        raise ConfigError(
            f"attention with a quantized cache: which tokens are the first {scheme.first} is not known where "
            "transformers' own cache has left some behind; call the model with a PackedCache, or under torch.no_grad()"
        )


def _places(query: Tensor, mask: Tensor | None, count: int, are_last: bool) -> Tensor:
    """The position among the keys of each query, which is the last key that it sees, int64 [B or 1, T]."""
    queries = query.shape[2]
    if are_last or mask is None:
        return torch.arange(count - queries, count, device=query.device)[None]
    keys = torch.arange(count, device=query.device)
    return torch.where(seen_in(mask[:, 0]), keys, 0).amax(dim=-1)


def _padding(mask: Tensor, batch: int) -> Tensor:
    """The number of leading keys that no query sees, int64 [B]. All keys if no query sees any."""
    seen = seen_in(mask[:, 0]).any(dim=1).expand(batch, -1)
    return (seen.cumsum(dim=-1) == 0).sum(dim=-1)


class _PackedReading(Reading):
    """Reads the tokens that a layer keeps."""

    def __init__(self, layer: PackedCacheLayer, work: torch.dtype) -> None:
        self.layer, self.work = layer, work
        self.count = layer.visible
        self.before = layer.keys.length - self.count
        """Tokens that are kept only for later calls."""

    def codes(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        start, stop = start + self.before, stop + self.before
        return self.layer.keys.read(start, stop, self.work), self.layer.values.read(start, stop, self.work)

    def exact(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        skipped = self.count - self.layer.recent.length
        key, value = self.layer.recent.read(start - skipped, stop - skipped)
        return key.to(self.work), value.to(self.work)

    def leading(self) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.layer
        assert layer.leading is not None and layer.padding is not None
        key, value = layer.leading
        return key.to(self.work), value.to(self.work), layer.padding - (layer.tokens - self.count)


class _GivenReading(Reading):
    """Reads keys and values that are passed to a call unquantized, float32 or float64."""

    def __init__(
        self, scheme: CacheScheme, matrices: CacheMatrices, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> None:
        self.scheme, self.matrices, self.key, self.value, self.mask = scheme, matrices, key, value, mask
        self.count = key.shape[2]

    def codes(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        key = turned(self.key[:, :, start:stop], self.matrices.keys)
        value = turned(self.value[:, :, start:stop], self.matrices.values)
        return rounded(key, self.scheme.keys), rounded(value, self.scheme.values)

    def exact(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.key[:, :, start:stop], self.value[:, :, start:stop]

    def leading(self) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, count, width = self.key.shape
        begin = torch.zeros(batch, dtype=torch.int64, device=self.key.device)
        if self.mask is not None:
            begin = _padding(self.mask, batch)
        places = begin[:, None] + torch.arange(self.scheme.first, device=begin.device)
        index = places.clamp(max=count - 1)[:, None, :, None].expand(-1, heads, -1, width)
        return self.key.gather(2, index), self.value.gather(2, index), begin


def quantize_cache(attention: nn.Module, scheme: CacheScheme, width: int, kv_heads: int) -> None:
    """Make an attention module quantize keys and values, whatever attention function is chosen for its model later.

    Stored matrices become its parameters, float32 [kv_heads, width, width]. They keep their type, and are identities
    until they are filled. ConfigError if the width of a head is not whole blocks.
    """
    if width % scheme.head_block:
        raise ConfigError(
            f"cache: heads of width {width} are not a multiple of {scheme.head_block}, which {scheme.spelled} needs; "
            "take formats with one scale a row, such as int4_row_asym"
        )
    assert not hasattr(attention, OPERANDS) and not hasattr(attention, INSTALLED)
    before: Any = attention.config
    own = copy(before)
    own._attn_implementation = CACHED
    attention.config = own
    device = next(attention.parameters()).device
    for name in scheme.stored_names:
        matrices = torch.eye(width, dtype=torch.float32, device=device).repeat(kv_heads, 1, 1)
        attention.register_parameter(name, nn.Parameter(matrices, requires_grad=False))
    setattr(attention, INSTALLED, InstalledCache(scheme, before))
    attention._apply = _apply_without_casts.__get__(attention)  # type: ignore[method-assign]
    setattr(attention, _HOOK, attention.register_forward_pre_hook(_pack_empty_layer, with_kwargs=True))


def restore_cache(attention: nn.Module) -> None:
    """Undo `quantize_cache`, if it was called."""
    installed = installed_cache(attention)
    if installed is None:
        return
    attention.config = installed.before
    for name in installed.scheme.stored_names:
        delattr(attention, name)
    getattr(attention, _HOOK).remove()
    for name in (_HOOK, "_apply", INSTALLED):
        delattr(attention, name)


def _pack_empty_layer(attention: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """A hook: before a module is called, its layer of the cache becomes a packed layer."""
    cache = named.get("past_key_values")
    if cache is None or (torch.is_grad_enabled() and _has_gradient(attention, (*arguments, *named.values()))):
        return
    pack_layer(cache, attention)


def _has_gradient(attention: nn.Module, inputs: tuple[Any, ...]) -> bool:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return any(x.requires_grad for x in (*tensors, *attention.parameters()))


def _apply_without_casts(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`_apply` of an attention module, as in `model.to(...)`. Its matrices move, and stay float32."""
    installed = installed_cache(self)
    assert installed is not None
    kept = nn.Module()
    for name in installed.scheme.stored_names:
        kept.register_parameter(name, self._parameters.pop(name))
    type(self)._apply(self, fn, recurse)
    kept._apply(keeping_type(fn))
    for name, parameter in kept.named_parameters():
        self.register_parameter(name, parameter)
    return self


AttentionInterface.register(CACHED, cached_attention)
AttentionMaskInterface.register(CACHED, AttentionMaskInterface()["sdpa"])
