"""Attention of one token per sequence to a packed cache, beside PyTorch's own attention to a bfloat16 cache.

Each way is first checked against float64 attention to the same numbers. Its error may be only slightly larger than that
of PyTorch's attention to them in bfloat16. A way that fails has no speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from mxrot.bench.kernels import KernelRow
from mxrot.bench.timing import copies_for, seconds_of_each
from mxrot.errors import ConfigError
from mxrot.formats import CacheScheme
from mxrot.kernels import CachedTokens, CacheMatrices, TokenRows, append_tokens, decode_attention, plain_append_tokens
from mxrot.run_time_cache import RunTimeCache
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.orders import multiply_by_hadamard

BASELINE, OWN_APPEND = "bf16 attention", "bf16 keys and values written"
BOUND = 1.5
"""The bound, as a multiple of the error of PyTorch's attention to the same numbers in bfloat16."""
DRAWN_AT_ONCE = 1 << 24
"""The most numbers that are packed at once."""


@dataclass(frozen=True)
class HeadShapes:
    """The shapes of an attention module."""

    heads: int = 32
    kv_heads: int = 8
    width: int = 128


def cache_scheme(name: str, transform: str, width: int, first: int = 0, last: int = 0) -> CacheScheme:
    """The cache scheme of `--kv` and `--kv-transform` with these names, and of `--kv-first` and `--kv-last`.
    ConfigError for unknown names, and for a head width that is not whole blocks."""
    scheme = RunTimeCache.of(name, transform, first, last).scheme
    if scheme is None:
        raise ConfigError(f"--kv {name}: is the cache that is measured beside it; name another format")
    if width % scheme.head_block:
        raise ConfigError(f"--kv {name}: heads of width {width} are not a multiple of {scheme.head_block}")
    return scheme


def bench_cache(
    device: torch.device,
    scheme: CacheScheme,
    sizes: Sequence[tuple[int, int]],
    shapes: HeadShapes = HeadShapes(),
    told: Callable[[str], None] = lambda line: None,
) -> list[KernelRow]:
    """Measure attention for each size, (sequences, tokens), and appending the newest token to the cache."""
    rows = []
    for batch, tokens in sizes:
        for row in (*_attention(device, scheme, batch, tokens, shapes), *_appending(device, scheme, batch, shapes)):
            rows.append(row)
            told(f"{row.kernel:44s} {row.shape!s:22s} {row.seconds or 'CHECK FAILED'}")
    return rows


def _matrices(scheme: CacheScheme, shapes: HeadShapes, device: torch.device) -> CacheMatrices:
    """The matrices of the kinds and types that a model has. Random matrices replace fitted ones."""
    keys, values = (_matrix(kind, shapes, device) for kind in (scheme.key_transform, scheme.value_transform))
    queries, outputs = (None if one is None else torch.linalg.inv(one) for one in (keys, values))
    return CacheMatrices(
        keys, None if queries is None else queries.mT.float(), values, None if outputs is None else outputs.float()
    )


def _matrix(kind: str, shapes: HeadShapes, device: torch.device) -> Tensor | None:
    if kind == "hadamard":
        found: Tensor = multiply_by_hadamard(torch.eye(shapes.width, dtype=torch.float64), False)
        return found[None].to(device)
    if kind == "stored":
        return random_orthogonal(shapes.kv_heads, shapes.width, torch.Generator().manual_seed(0)).double().to(device)
    return None


def _drawn(scheme: CacheScheme, batch: int, tokens: int, shapes: HeadShapes, device: torch.device) -> CachedTokens:
    """A cache of normal random keys and values."""
    heads, width = shapes.kv_heads, shapes.width
    rows = [TokenRows.empty(one, batch, heads, tokens, width, device) for one in (scheme.keys, scheme.values)]
    cached = CachedTokens(rows[0], rows[1])
    step = max(1, DRAWN_AT_ONCE // (batch * heads * width))
    for start in range(0, tokens, step):
        key, value = torch.randn(2, batch, heads, min(step, tokens - start), width, device=device)
        plain_append_tokens(key, key, value, cached, start)
    return cached


def _attention(
    device: torch.device, scheme: CacheScheme, batch: int, tokens: int, shapes: HeadShapes
) -> Iterator[KernelRow]:
    scaling, shape = shapes.width**-0.5, (batch, tokens)
    query = torch.randn(batch, shapes.heads, 1, shapes.width, device=device).to(torch.bfloat16)
    first = _drawn(scheme, batch, tokens, shapes, device)
    dense_bytes = 2 * 2 * batch * shapes.kv_heads * tokens * shapes.width
    packed_bytes = first.keys.nbytes + first.values.nbytes
    dense = [tuple(rows.dequantize().to(torch.bfloat16) for rows in (first.keys, first.values))]
    dense += [tuple(x.clone() for x in dense[0]) for _ in range(copies_for(dense_bytes) - 1)]
    packed = [first, *(_clone(first) for _ in range(copies_for(packed_bytes) - 1))]

    def own(pair: tuple[Tensor, ...]) -> Tensor:
        keys, values = pair
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)

    def ours(cached: CachedTokens) -> Tensor:
        return decode_attention(query, cached, tokens, None, scaling)

    exact = _exact(query, first, scaling)
    own_error = _error(own(dense[0]), exact)
    error, bound = _error(ours(first), exact), BOUND * own_error
    candidates: list[list[Callable[[], Tensor]]] = [[partial(own, pair) for pair in dense]]
    candidates += [[partial(ours, cached) for cached in packed]] if error <= bound else []
    seconds = seconds_of_each(candidates, device)
    operations = 4.0 * batch * shapes.heads * tokens * shapes.width
    yield KernelRow(BASELINE, shape, seconds[0], dense_bytes, operations, own_error, own_error)
    name = f"attention to {_name(scheme)}"
    yield KernelRow(
        name, shape, seconds[-1] if error <= bound else None, packed_bytes, operations, error, bound, BASELINE
    )


def _appending(device: torch.device, scheme: CacheScheme, batch: int, shapes: HeadShapes) -> Iterator[KernelRow]:
    """Measure appending a token to a cache of one position. Other positions make no difference."""
    heads, width, dtype = shapes.kv_heads, shapes.width, torch.bfloat16
    query = torch.randn(batch, shapes.heads, 1, width, device=device).to(dtype)
    key, value = torch.randn(2, batch, heads, 1, width, device=device).to(dtype)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    found, expected = (_drawn(scheme, batch, 1, shapes, device) for _ in range(2))
    matrices = _matrices(scheme, shapes, device)
    found, expected = (CachedTokens(one.keys, one.values, matrices) for one in (found, expected))
    append_tokens(query, key, value, found, position)
    plain_append_tokens(query, key, value, expected, position)
    pairs = [(found.keys, expected.keys), (found.values, expected.values)]
    error = max(float((one.codes != other.codes).double().mean()) for one, other in pairs)
    dense = [torch.empty(batch, heads, 1, width, dtype=dtype, device=device) for _ in range(2)]

    def own() -> None:
        for target, source in zip(dense, (key, value), strict=True):
            target.index_copy_(2, position, source)

    def ours() -> None:
        append_tokens(query, key, value, found, position)

    seconds = seconds_of_each([[own], [ours]], device)
    size = key.nbytes + value.nbytes
    yield KernelRow(OWN_APPEND, (batch, 1), seconds[0], 2 * size, 0, 0.0, 0.0)
    read = size + (2 * query.nbytes if matrices.keys is not None else 0)
    written = found.keys.nbytes + found.values.nbytes
    bound = 1e-4
    name = f"keys and values written as {_name(scheme)}"
    yield KernelRow(
        name, (batch, 1), seconds[1] if error <= bound else None, read + written, 0, error, bound, OWN_APPEND
    )


def _name(scheme: CacheScheme) -> str:
    return scheme.keys.format.name


def _clone(cached: CachedTokens) -> CachedTokens:
    rows = [
        TokenRows(one.quantizer, one.codes.clone(), {name: part.clone() for name, part in one.parts.items()})
        for one in (cached.keys, cached.values)
    ]
    return CachedTokens(rows[0], rows[1])


def _exact(query: Tensor, cached: CachedTokens, scaling: float) -> Tensor:
    """Attention of the first sequence in float64, to the values of its cache."""
    rows = [
        TokenRows(one.quantizer, one.codes[:1], {name: part[:1] for name, part in one.parts.items()}).dequantize()
        for one in (cached.keys, cached.values)
    ]
    keys, values = (x.double() for x in rows)
    grouped = query[:1].double().reshape(1, keys.shape[1], -1, query.shape[-1])
    return ((grouped @ keys.mT * scaling).softmax(dim=-1) @ values).view(1, -1, 1, query.shape[-1])


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found[:1].double() - exact).norm() / exact.norm())


def sizes_of(batches: Sequence[int], tokens: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs of the two."""
    return list(product(batches, tokens))
