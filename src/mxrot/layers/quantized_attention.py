"""Attention whose two products have quantized operands: Q(q) Q(k)^T, and Q(p) Q(v) (arXiv 2411.09909 does both).

This is an attention function for transformers. An attention module calls it after `quantize_attention` has given it
operands and its own config, so the original model may run beside it on the same config.

**Which blocks.** Blocks lie along the dimension that is summed. The blocks of q and k are along the width of a head,
within one token. The blocks of p and v are along the tokens that are attended to: tokens 0 to B - 1 of the sequence, B
to 2 B - 1, and so on. v has such blocks for each of its channels.

**The incomplete block.** A token does not see later tokens, so these must not affect the scales by which its output is
computed. For the query at token t, blocks that end before t hold all their tokens. The block of t itself holds the
tokens up to t, and zeros beyond, in p and in v. v's values of that block are therefore quantized once for each query in
it. A cache holds the same when token t is generated, and a whole text gives the same at token t. Both agree up to the
order of sums, which may move a number across the middle between two codes. Keys that no query sees are padding, and
count as zeros in v. Padding on the left moves the tokens to other positions in their blocks, and so to other codes,
unless its length is a multiple of B.

q, k and v are quantized from their own type, p from float32. Products and sums are float32 (float64 for a model in
float64). p is not normalized again. The gradient is that of products with unrounded operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from mxrot.errors import ConfigError
from mxrot.formats import AttentionOperands, TensorQuantizer
from mxrot.layers.attention import NAME, OPERANDS, UNMASKED

QUANTIZED = "mxrot_quantized_attention"
NUMBERS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""The maximum number of scores, or of values in incomplete blocks, at one time. About ten tensors have this size."""
KNOWN_MASKS = ("sdpa", "eager", NAME, UNMASKED)
"""Attention functions of the model whose masks are supported."""
_REFUSED = ("softcap", "sliding_window", "s_aux")


@dataclass(frozen=True)
class _Installed:
    operands: AttentionOperands
    before: Any
    """The config that the module had before."""


def quantize_attention(attention: nn.Module, operands: AttentionOperands) -> None:
    """Make an attention module quantize its operands, whatever attention function is chosen for its model later."""
    before: Any = attention.config
    own = copy(before)
    own._attn_implementation = QUANTIZED
    attention.config = own
    setattr(attention, OPERANDS, _Installed(operands, before))


def restore_attention(attention: nn.Module) -> None:
    """Undo `quantize_attention`, if it was called."""
    if (installed := getattr(attention, OPERANDS, None)) is not None:
        attention.config = installed.before
        delattr(attention, OPERANDS)


def operands_of(attention: nn.Module) -> AttentionOperands | None:
    """The operands of a module. None if they are not quantized."""
    installed: _Installed | None = getattr(attention, OPERANDS, None)
    return None if installed is None else installed.operands


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """[batch, heads, tokens, width], and keys and values with as many heads or fewer, to [batch, tokens, heads, width].

    `attention_mask` is as for PyTorch's own attention or transformers' eager one: flags, or numbers to add, [batch, 1,
    tokens, keys]. Without a mask a single query sees all keys. Of several queries the first sees one key, and each
    later one sees one key more. ConfigError for dropout, soft caps, windows and sinks, and in a model that makes other
    masks.
    """
    installed: _Installed = getattr(module, OPERANDS)
    operands = installed.operands
    _check_call(installed.before._attn_implementation, dropout, more)
    if attention_mask is None and query.shape[2] > 1:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]  # later keys are not filled yet
    with torch.autocast(query.device.type, enabled=False):
        found = _attend(operands, query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5)
    return found.to(query.dtype).transpose(1, 2).contiguous(), None


def _check_call(masks: str | None, dropout: float, more: dict[str, Any]) -> None:
    wrong = [name for name in _REFUSED if more.get(name) is not None]
    wrong += ["dropout"] if dropout else []
    wrong += [] if masks in KNOWN_MASKS else [f"masks of attn_implementation={masks!r}"]
    if wrong:
        raise ConfigError(
            f"attention with quantized operands knows no {', '.join(wrong)}; take attn_implementation='sdpa' and the "
            "model as it comes, or a recipe without [attention]"
        )


def _attend(
    operands: AttentionOperands, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """The output for float32 or float64 inputs, [batch, heads, tokens, width]."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, value = (rounded(x.to(work), own) for x, own in _with(operands.queries_keys, query, key, value))
    mask = None if mask is None else mask[..., : key.shape[2]]
    if mask is not None:
        value = value.masked_fill(~seen_in(mask).any(dim=2).unsqueeze(-1), 0)
    values = _Values.of(value, operands.probabilities_values)
    query = query.unflatten(1, (key.shape[1], -1))
    parts = []
    for rows in _row_slices(query, values):
        scores = (query[:, :, :, rows].flatten(2, 3) @ key.mT).unflatten(2, (-1, rows.stop - rows.start)) * scaling
        if mask is None:
            seen = _causal(rows, query.shape[3], key.shape[2], key.device)
        else:
            some = mask[:, :, None, rows]
            seen, scores = seen_in(some), scores if some.dtype == torch.bool else scores + some
        # A padding query sees no keys, and gets zeros.
        p = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).masked_fill(~seen, 0)
        parts.append(values.summed(p, seen))
    return torch.cat(parts, dim=3).flatten(1, 2)


def _with(quantizer: TensorQuantizer | None, *tensors: Tensor) -> Iterator[tuple[Tensor, TensorQuantizer | None]]:
    """q and k with their quantizer, v without one."""
    query, key, value = tensors
    yield from ((query, quantizer), (key, quantizer), (value, None))


def seen_in(mask: Tensor) -> Tensor:
    """Flags of the keys that each query sees, from a mask of flags or of numbers to add."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _causal(rows: slice, queries: int, keys: int, device: torch.device) -> Tensor:
    """Flags of a causal mask, [1, 1, 1, rows, keys]."""
    places = torch.arange(rows.start, rows.stop, device=device) + keys - queries
    return (torch.arange(keys, device=device) <= places[:, None])[None, None, None]


def _row_slices(query: Tensor, values: _Values) -> Iterator[slice]:
    """Slices of queries that are computed at one time."""
    batch, kept, shared, queries, _ = query.shape
    each = batch * kept * max(shared * values.keys, values.numbers_per_query)
    step = max(1, NUMBERS_AT_ONCE.get(query.device.type, NUMBERS_AT_ONCE["cpu"]) // max(1, each))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))


@dataclass(frozen=True)
class _Values:
    """The values [batch, kept, keys, width], and the quantizer of values and probabilities."""

    value: Tensor
    """The values, padded with zeros to whole blocks."""
    whole: Tensor
    """All values quantized, [batch, kept, width, keys]. Valid for blocks before the block of the query."""
    keys: int
    quantizer: TensorQuantizer | None

    @staticmethod
    def of(value: Tensor, quantizer: TensorQuantizer | None) -> _Values:
        keys = value.shape[2]
        if quantizer is not None:
            value = F.pad(value, (0, 0, 0, -keys % _block_of(quantizer)))
        return _Values(value, rounded(value.mT, quantizer), keys, quantizer)

    @property
    def numbers_per_query(self) -> int:
        """Numbers in the query's own block."""
        return 0 if self.quantizer is None else _block_of(self.quantizer) * self.value.shape[-1]

    def summed(self, p: Tensor, seen: Tensor) -> Tensor:
        """The sums [batch, kept, heads that share, queries, width] for probabilities [..., queries, keys], which are 0
        where not `seen`."""
        if self.quantizer is None:
            return (p.flatten(2, 3) @ self.whole.mT).unflatten(2, p.shape[2:4])
        block, keys = _block_of(self.quantizer), self.value.shape[2]
        p = rounded(F.pad(p, (0, keys - self.keys)), self.quantizer).unflatten(-1, (-1, block))
        places = torch.arange(self.keys, device=p.device)
        last = torch.where(seen, places, 0).amax(dim=-1)[:, 0, 0].expand(len(p), -1)
        own = last // block
        is_own = torch.arange(keys // block, device=p.device) == own[..., None]
        before = p.masked_fill(is_own[:, None, None, :, :, None], 0).flatten(-2)
        found = (before.flatten(2, 3) @ self.whole.mT).unflatten(2, p.shape[2:4])
        picked = own[:, None, None, :, None, None].expand(*p.shape[:4], 1, block)
        return found + torch.einsum("bkhqn,bqkwn->bkhqw", p.gather(4, picked).squeeze(4), self._own(own, last))

    def _own(self, own: Tensor, last: Tensor) -> Tensor:
        """For each query [batch, queries], the quantized values of its own block, as far as it sees them: [batch,
        queries, kept, width, block]."""
        assert self.quantizer is not None
        block = _block_of(self.quantizer)
        blocks = self.value.unflatten(2, (-1, block)).transpose(1, 2)
        sequence = torch.arange(len(own), device=own.device)[:, None]
        beyond = own[..., None] * block + torch.arange(block, device=own.device) > last[..., None]
        return rounded(blocks[sequence, own].masked_fill(beyond[:, :, None, :, None], 0).mT, self.quantizer)


def _block_of(quantizer: TensorQuantizer) -> int:
    block = quantizer.format.block
    assert block is not None
    return block


def rounded(x: Tensor, quantizer: TensorQuantizer | None) -> Tensor:
    """Q(x), or x without a quantizer; with the gradient of x."""
    if quantizer is None:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        found: Tensor = _Rounded.apply(x, quantizer)
        return found
    return quantizer(x)


class _Rounded(torch.autograd.Function):
    """Q(x), with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: TensorQuantizer) -> Tensor:
        return quantizer(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


AttentionInterface.register(QUANTIZED, quantized_attention)
AttentionMaskInterface.register(QUANTIZED, AttentionMaskInterface()["sdpa"])
