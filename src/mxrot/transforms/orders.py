"""Hadamard matrices of many orders, and products with them.

The orders are Kronecker products of Sylvester's 2^k, Paley I (q + 1 for a prime power q = 3 mod 4) and Paley II
(2 (q + 1) for q = 1 mod 4) (Paley, J. Math. Phys. 12, 1933; Hedayat and Wallis, Ann. Stat. 6, 1978, section 3). They
cover nearly every hidden and feed-forward size of a language model. Of all such products for an order, the one with the
fewest additions is taken; in a tie, the one with the larger power of two.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mxrot.errors import ConfigError

LARGEST_FACTOR = 1024
"""The largest factor that is no power of two. It is multiplied as a dense matrix."""


def hadamard_matrix(size: int) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix, float64 [size, size]; ConfigError unless size is a power of two."""
    if size < 1 or size & (size - 1):
        raise ConfigError(f"a Hadamard block needs a power of two, got {size}")
    core = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(core, matrix)
    return matrix / size**0.5


def factors_of(order: int) -> tuple[int, ...]:
    """The orders of Hadamard matrices whose Kronecker product has `order`: Paley's, falling, then one power of two.

    ConfigError if the constructions do not reach it.
    """
    found = _best_factors(order)
    if found is None:
        raise ConfigError(
            f"a Hadamard matrix of order {order} is not known here: it is no product of a power of two and of orders "
            f"q + 1 or 2 (q + 1) of a prime power q, up to {LARGEST_FACTOR} each"
        )
    paley, power = found
    return (*paley, power)


@cache
def _best_factors(order: int) -> tuple[tuple[int, ...], int] | None:
    """Paley orders and a power of two; None if no product gives this order."""
    if order < 1:
        return None
    if not order & (order - 1):
        return (), order
    found = []
    for factor in range(12, min(order, LARGEST_FACTOR) + 1, 4):
        rest = _best_factors(order // factor) if order % factor == 0 and _paley(factor) else None
        if rest is not None:
            found.append((tuple(sorted((factor, *rest[0]), reverse=True)), rest[1]))
    return min(found, key=lambda way: (sum(way[0]) + way[1].bit_length(), -way[1]), default=None)


@cache
def _paley(order: int) -> tuple[int, int] | None:
    """The construction that gives this order, 1 or 2, and its prime power; None if neither does."""
    if order % 4 == 0 and (order - 1) % 4 == 3 and _prime_power(order - 1):
        return 1, order - 1
    half = order // 2 - 1
    return (2, half) if order % 4 == 0 and half % 4 == 1 and _prime_power(half) else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e; None if q is not a power of a prime."""
    p = next((p for p in range(2, q + 1) if q % p == 0), 0)
    e = 0
    while p and q % p == 0:
        q, e = q // p, e + 1
    return (p, e) if e and q == 1 else None


@cache
def hadamard_factor(order: int) -> Tensor:
    """A Hadamard matrix of +-1 by Paley's constructions, float64 [order, order], for a factor of `factors_of`."""
    found = _paley(order)
    assert found is not None, order
    construction, q = found
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[0, 1:], S[1:, 0] = 1, 1 if construction == 2 else -1
    S[1:, 1:] = residue_characters(q)
    identity = torch.eye(q + 1, dtype=torch.float64)
    if construction == 1:  # S is skew and S S^T = q I
        return identity + S
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(S, plus) + torch.kron(identity, minus)


def residue_characters(q: int) -> Tensor:
    """Q[a, b], float64: 1 if a - b is a nonzero square of the field of q elements, 0 if a = b, else -1.

    An element of the field is a polynomial over the integers modulo p, written as a number in base p.
    """
    found = _prime_power(q)
    assert found is not None
    p, e = found
    character = torch.zeros(q, dtype=torch.float64)
    powers = torch.tensor(_powers_of_generator(p, e))
    character[powers[0::2]], character[powers[1::2]] = 1.0, -1.0
    places = p ** torch.arange(e)
    digits = torch.arange(q)[:, None] // places % p
    differences = (digits[:, None] - digits[None]) % p
    return character[(differences * places).sum(dim=-1)]


def _powers_of_generator(p: int, e: int) -> list[int]:
    """x^0, x^1, ... modulo the first polynomial of degree e for which the powers of x are all nonzero elements."""
    q = p**e
    for number in range(q):
        low = [number // p**i % p for i in range(e)]  # x^e = low[0] + low[1] x + ...
        element, powers = [1] + [0] * (e - 1), [1]
        while len(powers) < q:
            top = element[-1]
            element = [(below + top * added) % p for below, added in zip([0, *element[:-1]], low, strict=True)]
            value = sum(digit * p**i for i, digit in enumerate(element))
            if value in (0, 1):
                break
            powers.append(value)
        if len(powers) == q - 1:
            return powers
    raise AssertionError(f"no primitive polynomial for {p}^{e}")


def random_hadamard(order: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """diag(s) H, float64 [order, order] on `device`, with H the orthonormal Hadamard matrix of this order.

    The random signs s are drawn on the CPU. ConfigError as for `factors_of`.
    """
    factors_of(order)
    signs = torch.randint(0, 2, (order,), generator=generator).double() * 2 - 1
    found: Tensor = multiply_by_hadamard(torch.diag(signs.to(device)), False)
    return found


@torch.library.custom_op("mxrot::multiply_by_hadamard", mutates_args=())
def multiply_by_hadamard(x: Tensor, transposed: bool) -> Tensor:
    """x H, or x H^T, over the last dimension, for the orthonormal Hadamard matrix; in the type of x, float32 or
    float64.

    It is one operation for torch.compile. Dense products use the precision that PyTorch is set to for float32.
    """
    factors = factors_of(x.shape[-1])
    *paley, power = factors
    with torch.autocast(x.device.type, enabled=False):
        out = _butterflies(x.reshape(-1, power), power).view(-1, *factors)
        for axis, order in enumerate(paley, start=1):
            matrix = _on_device(order, x.device, x.dtype)
            matrix = matrix.mT if transposed else matrix
            out = (out.transpose(axis, -1) @ matrix).transpose(axis, -1)
        return (out * x.shape[-1] ** -0.5).reshape(x.shape)


@multiply_by_hadamard.register_fake
def _shape(x: Tensor, transposed: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.transposed = inputs[1]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return multiply_by_hadamard(gradient, not ctx.transposed), None


multiply_by_hadamard.register_autograd(_gradients, setup_context=_keep)


def _butterflies(x: Tensor, size: int) -> Tensor:
    """x [n, size] times the Sylvester matrix of +-1; never `x` itself."""
    out, width = x.clone(), 1
    while width < size:
        left, right = out.view(-1, size // (2 * width), 2, width).unbind(dim=2)
        out = torch.stack([left + right, left - right], dim=2)
        width *= 2
    return out.view(-1, size)


@cache
def _on_device(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return hadamard_factor(order).to(device, dtype)
