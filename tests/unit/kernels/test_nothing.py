"""Kernels that stand for launching and for memory alone."""

from __future__ import annotations

import pytest
import torch

from mxrot.kernels.fused.nothing import half, nothing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_nothing_is_launched() -> None:
    x = torch.ones(3, device=DEVICE)
    nothing(x)
    assert x.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("shape", [(1, 8), (3, 96), (16, 32), (5, 4096)])
def test_half_of_the_bytes_depend_on_all(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(DEVICE)
    pairs = x.flatten().view(torch.int64).view(-1, 2)
    assert torch.equal(half(x).view(torch.int64), pairs[:, 0] ^ pairs[:, 1])
