"""Attention of new tokens to packed keys and values, and packing of new tokens: the specification.

One token of one head is a row of a quantized tensor. Keys are kept as k T and queries are multiplied by T^-T, so that
their products do not change. Values are kept as v U, and attention's sums of them are multiplied by U^-1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats import QTensor, TensorQuantizer, as_blocks, choose_parts, encode_blocks
from mxrot.kernels.plain.exact_tokens import ExactTokens


@dataclass(frozen=True)
class TokenRows:
    """Packed keys or values, with room for more tokens."""

    quantizer: TensorQuantizer
    codes: Tensor
    """uint8 [B, kv heads, capacity, D * bits / 8]."""
    parts: dict[str, Tensor]
    """The parts of the format, by name: [B, kv heads, capacity, G, ...]."""

    @property
    def capacity(self) -> int:
        """The maximum number of tokens."""
        return self.codes.shape[2]

    @property
    def width(self) -> int:
        """The width D of a row."""
        return self.codes.shape[-1] * 8 // self.quantizer.format.bits

    def first(self, count: int) -> TokenRows:
        """The first `count` tokens, as views."""
        parts = {name: part[:, :, :count] for name, part in self.parts.items()}
        return TokenRows(self.quantizer, self.codes[:, :, :count], parts)

    def dequantize(self) -> Tensor:
        """The values of the codes, float32 [B, kv heads, capacity, D]."""
        parts = self.quantizer.as_parts([self.parts[name] for name in self.quantizer.part_names])
        return QTensor.dequantize_packed(self.codes, parts, self.quantizer.format)

    @property
    def nbytes(self) -> int:
        """The bytes of all places, filled or not."""
        return self.codes.nbytes + sum(part.nbytes for part in self.parts.values())

    @staticmethod
    def empty(
        quantizer: TensorQuantizer, batch: int, kv_heads: int, capacity: int, width: int, device: torch.device | str
    ) -> TokenRows:
        """Room for `capacity` tokens, all zeros. ConfigError if a row of `width` is not whole blocks."""
        (codes, dtype), *parts = quantizer.stored_parts(1, width).values()
        lead = batch, kv_heads, capacity
        made = [torch.zeros(*lead, *shape[1:], dtype=of, device=device) for shape, of in parts]
        filled = torch.zeros(*lead, *codes[1:], dtype=dtype, device=device)
        return TokenRows(quantizer, filled, dict(zip(quantizer.part_names, made, strict=True)))


@dataclass(frozen=True)
class CacheMatrices:
    """[1 or kv heads, D, D] each, multiplied from the right; None is the identity. Products and their sums are in the
    type of the matrices, float32 or float64. In float64, codes do not depend on the order of sums."""

    keys: Tensor | None = None
    """T."""
    queries: Tensor | None = None
    """T^-T."""
    values: Tensor | None = None
    """U."""
    outputs: Tensor | None = None
    """U^-1."""


@dataclass(frozen=True)
class CachedTokens:
    """Keys and values of one layer, and their transforms."""

    keys: TokenRows
    values: TokenRows
    matrices: CacheMatrices = CacheMatrices()


def plain_append_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cached: CachedTokens,
    position: int | Tensor,
    exact: ExactTokens | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Transform keys and values [B, kv heads, T, D] of new tokens in float32, and pack them into the places from
    `position` on, an int, or int64 [1] on the device.

    Returns the transformed query [B, heads, T, D], in its own type. With `exact`, one token is also kept unquantized,
    and `visible` says whether it is padding, as in `ExactTokens.keep`. No value is refused: rows that hold NaN or Inf
    are read back as NaN.
    """
    _write(cached.keys, times_each(key, cached.matrices.keys), position)
    _write(cached.values, times_each(value, cached.matrices.values), position)
    if exact is not None:
        exact.keep(key, value, position, visible)
    return query if cached.matrices.queries is None else times_each(query, cached.matrices.queries).to(query.dtype)


def plain_decode_attention(
    query: Tensor,
    cached: CachedTokens,
    length: int | Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    exact: ExactTokens | None = None,
) -> Tensor:
    """Attention of one token per sequence, query [B, heads, 1, D], to the first `length` tokens, in the query's shape
    and type.

    `length` is an int, or the place of the newest token, int64 [1] on the device. A token is not seen if its flag in
    `visible` [B, N] is 0, with N at least the length. A query that sees no token gets zeros. Arithmetic is float32.
    With `softcap` c, scores are c tanh(score / c). With `exact`, some tokens are read unquantized, by the untransformed
    query, and are not multiplied by U^-1.
    """
    tokens = length if isinstance(length, int) else cached.keys.capacity
    length = length if isinstance(length, int) else length + 1
    keys, values = cached.keys.first(tokens).dequantize(), cached.values.first(tokens).dequantize()
    scores = _scores(query, keys, scaling)
    if exact is not None:
        own_keys, own_values, is_exact = exact.overlay(keys, values, length)
        scores = torch.where(is_exact[:, None, None], _scores(exact.query, own_keys, scaling), scores)
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    seen = (torch.arange(tokens, device=query.device) < length)[None]
    if visible is not None:
        seen = seen & (torch.nn.functional.pad(visible, (0, max(0, tokens - visible.shape[1])))[:, :tokens] != 0)
    seen = seen[:, None, None]
    p = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).masked_fill(~seen, 0)
    # Places that are not filled yet are not read, whatever they hold.
    outputs = cached.matrices.outputs
    packed = seen if exact is None else seen & ~is_exact[:, None, None]
    found = (p.masked_fill(~packed, 0) @ values.masked_fill(~packed.mT, 0)).reshape(query.shape)
    found = found if outputs is None else times_each(found, outputs)
    if exact is not None:
        own = seen & is_exact[:, None, None]
        found = found + (p.masked_fill(~own, 0) @ own_values.masked_fill(~own.mT, 0)).reshape(query.shape)
    return found.to(query.dtype)


def _scores(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Scores, float32 [B, kv heads, heads that share them, tokens]."""
    return query.float().reshape(len(query), keys.shape[1], -1, query.shape[-1]) @ keys.mT * scaling


def times_each(x: Tensor, matrices: Tensor | None) -> Tensor:
    """x [B, heads, T, D] times the matrix of its kv head, float32."""
    if matrices is None:
        return x.float()
    grouped = x.to(matrices.dtype).unflatten(1, (len(matrices), -1))
    return (grouped @ matrices[:, None]).flatten(1, 2).float()


def _write(rows: TokenRows, x: Tensor, position: int | Tensor) -> None:
    format, rule = rows.quantizer.format, rows.quantizer.rule
    blocks = as_blocks(x, format, "keys or values")
    quantized = encode_blocks(blocks, choose_parts(blocks, format, rule), format)
    targets, sources = {"codes": rows.codes, **rows.parts}, {"codes": quantized.packed(), **quantized.parts.tensors}
    for name, target in targets.items():
        if isinstance(position, int):
            target[:, :, position : position + x.shape[2]] = sources[name]
        else:
            places = position + torch.arange(x.shape[2], device=position.device)
            target.index_copy_(2, places, sources[name])
