"""Transforms of keys and values: what they balance, and that no other leaves a smaller product of traces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.transforms.heads import DAMPING, head_transforms
from mxrot.transforms.orders import hadamard_matrix

HEADS, D = 3, 16


def moments(seed: int, heads: int = HEADS, width: int = D) -> Tensor:
    """Of channels as uneven as those of keys."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, 4 * width, width, dtype=torch.float64, generator=draws)
    x = x * torch.logspace(0, 2, width, dtype=torch.float64)[torch.randperm(width, generator=draws)]
    return x.mT @ x / x.shape[1]


def damped(m: Tensor) -> Tensor:
    mean = m.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    return m + DAMPING * mean * torch.eye(m.shape[-1], dtype=m.dtype)


def product_of_traces(t: Tensor, kept: Tensor, readers: Tensor) -> Tensor:
    """tr(T^T M T) tr(T^-1 H T^-T) of each head: what noise as large as a channel's own mean square costs."""
    inverse = torch.linalg.inv(t)
    a, b = t.mT @ kept @ t, inverse @ readers @ inverse.mT
    return a.diagonal(dim1=-2, dim2=-1).sum(-1) * b.diagonal(dim1=-2, dim2=-1).sum(-1)


def test_both_sides_get_the_same_moments_and_every_channel_its_share() -> None:
    kept, readers = damped(moments(0)), damped(moments(1))
    t = head_transforms(moments(0), moments(1))
    inverse = torch.linalg.inv(t)
    a, b = t.mT @ kept @ t, inverse @ readers @ inverse.mT
    for one in (a, b):
        diagonal = one.diagonal(dim1=-2, dim2=-1)
        assert torch.allclose(diagonal, diagonal.mean(dim=-1, keepdim=True).expand_as(diagonal), rtol=1e-9)
    scale = (a[:, :1, :1] / b[:, :1, :1]).clone()
    assert torch.allclose(a, b * scale, rtol=1e-9, atol=1e-9 * float(a.abs().max()))


def test_no_other_matrix_leaves_a_smaller_product_of_traces() -> None:
    kept, readers = moments(2), moments(3)
    t = head_transforms(kept, readers)
    least = product_of_traces(t, damped(kept), damped(readers))
    draws = torch.Generator().manual_seed(4)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            other = t @ (torch.eye(D, dtype=t.dtype) + size * torch.randn(HEADS, D, D, dtype=t.dtype, generator=draws))
            assert (product_of_traces(other, damped(kept), damped(readers)) >= least * (1 - 1e-12)).all()
    for other in (torch.eye(D, dtype=t.dtype), hadamard_matrix(D).double()):
        assert (product_of_traces(other.expand(HEADS, -1, -1), damped(kept), damped(readers)) > 2 * least).all()


def test_the_least_product_is_the_square_of_the_sum_of_singular_values() -> None:
    """tr(T^T M T) tr(T^-1 H T^-T) >= tr((M^1/2 H M^1/2)^1/2)^2, by Cauchy and Schwarz."""
    kept, readers = damped(moments(5)), damped(moments(6))
    least = product_of_traces(head_transforms(moments(5), moments(6)), kept, readers)
    values, vectors = torch.linalg.eigh(kept)
    root = vectors * values.sqrt()[:, None, :] @ vectors.mT
    bound = torch.linalg.eigvalsh(root @ readers @ root).clamp(min=0).sqrt().sum(dim=-1).square()
    assert torch.allclose(least, bound, rtol=1e-9)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_keys_keep_their_size(factor: float) -> None:
    t = head_transforms(factor * moments(7), moments(8))
    assert torch.allclose(torch.linalg.slogdet(t).logabsdet, torch.zeros(HEADS, dtype=t.dtype), atol=1e-9)
    assert torch.allclose(t, head_transforms(moments(7), moments(8)), rtol=1e-7, atol=1e-9)


def test_a_dead_head_gets_the_hadamard_matrix() -> None:
    kept = moments(9)
    kept[1] = 0
    t = head_transforms(kept, moments(10))
    assert torch.allclose(t[1], hadamard_matrix(D).to(t), atol=1e-12)
    assert torch.isfinite(t).all()


def test_widths_without_a_hadamard_matrix_are_refused() -> None:
    with pytest.raises(ConfigError, match="92"):
        head_transforms(moments(0, 1, 92), moments(1, 1, 92))
