"""Attention of models that share keys and values among heads, without copies of them; masks of single tokens.

PyTorch's own attention, given to transformers as an attention function of this project. With one token and a mask,
the heads that share a key become the rows of one query, as in transformers from 5.20 on; before, keys and values were
copied for every head. Without a mask the copies are views whose gradient is a plain sum: PyTorch's own sharing of
heads copies by index, and deterministically its gradient is a sort.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from mxrot.models import Family

NAME = "mxrot_shared_heads"
UNMASKED = "mxrot_unmasked"
INDEXED = "indexed_attention"
"""What a config calls attention to chosen tokens."""
OPERANDS = "quantized_operands"
"""The attribute of a module whose products have quantized operands (`layers.quantized_attention`)."""
_KNOWN_ARGUMENTS = frozenset({"position_ids", "use_cache", "output_attentions", "cache_position", "logits_to_keep"})
"""Arguments that change nothing here; transformers' own function gets a call with others (soft caps, windows)."""


def shared_heads_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """[batch, heads, tokens, width] and keys and values with fewer heads, to [batch, tokens, heads, width]."""
    heads, kept = query.shape[1], key.shape[1]
    is_plain = not dropout and not {name for name in more if more[name] is not None} - _KNOWN_ARGUMENTS
    is_step = attention_mask is not None and query.shape[2] == 1 and attention_mask.shape[1] == 1
    if heads == kept or not is_plain or (attention_mask is not None and not is_step):
        own = AttentionInterface()["sdpa"]
        output, _ = own(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
        return output, None
    if is_step:
        grouped = query.reshape(len(query), kept, heads // kept, query.shape[-1])
        found = nn.functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
        return found.reshape(query.shape).transpose(1, 2).contiguous(), None
    key, value = (for_each_head(part, heads // kept) for part in (key, value))
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, scale=scaling, is_causal=query.shape[2] > 1 and getattr(module, "is_causal", True)
    )
    return found.transpose(1, 2).contiguous(), None


def for_each_head(part: Tensor, times: int) -> Tensor:
    """[batch, heads, tokens, width] to [batch, heads * times, tokens, width]."""
    return part[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def unmasked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `shared_heads_attention` where every query sees all keys, by the fastest function there is."""
    found = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shared_heads_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
# transformers makes no mask for a function that has none registered.
AttentionInterface.register(UNMASKED, unmasked_attention)


@contextmanager
def shared_heads(*models: PreTrainedModel) -> Iterator[None]:
    """While open, these models compute attention this way, if they would by PyTorch's own function.

    Not where an indexer chooses tokens: those classes put its choice into the mask for that function alone.
    """
    with _attention(NAME, models):
        yield


@contextmanager
def unmasked(*models: PreTrainedModel) -> Iterator[None]:
    """While open, every token that these models are given sees all keys, if they use PyTorch's own function, and no
    indexer chooses."""
    with _attention(UNMASKED, models):
        yield


@contextmanager
def _attention(function: str, models: Sequence[PreTrainedModel]) -> Iterator[None]:
    configs = [model.config.get_text_config() for model in models]
    before = [config._attn_implementation for config in configs]
    try:
        for config, name in zip(configs, before, strict=True):
            if name == "sdpa" and not has_indexer(config):
                config._attn_implementation = function
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def has_indexer(config: Any) -> bool:
    """Does attention, by the config of a text model, read tokens that an indexer chooses?"""
    return INDEXED in (getattr(config, "layer_types", None) or ())


def score_heads(model: PreTrainedModel) -> int:
    """How many heads write out a score for each pair of tokens; none with PyTorch's own attention."""
    config = model.config.get_text_config()
    writes = config._attn_implementation == "eager" or any(hasattr(module, OPERANDS) for module in model.modules())
    return int(config.num_attention_heads) if writes else 0


def step_mask(
    model: PreTrainedModel, family: Family, position: Tensor, places: int, sequences: int
) -> Tensor | dict[str, Tensor]:
    """What `model` takes as the mask of one token at `position` [1] of each sequence, with keys at so many places.

    [sequences, 1, 1, places], and where there are several kinds of blocks one for each.
    """
    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    place = torch.arange(places, device=position.device)
    seen = place <= position
    near = seen if window is None else seen & (place > position - window)
    if family.windows == "by kind" and len(kinds) > 1:
        masks = {"full_attention": seen, "sliding_attention": near}
        return {kind: _as_mask(model, masks[kind], sequences) for kind in kinds}
    is_near = family.windows == "all" or (family.windows == "by kind" and kinds == {"sliding_attention"})
    return _as_mask(model, near if is_near else seen, sequences)


def _as_mask(model: PreTrainedModel, visible: Tensor, sequences: int) -> Tensor:
    """Flags [places] in the form that the model's attention function takes."""
    if score_heads(model):
        visible = torch.where(visible, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    return visible.expand(sequences, 1, 1, -1)
