"""KL divergence of logits: the kernel against its plain twin."""

from __future__ import annotations

import pytest
import torch

from mxrot.kernels import plain_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 4096, 10000])
def test_the_kernel_is_the_plain_one(width: int, dtype: torch.dtype) -> None:
    from mxrot.kernels.fused.divergence import divergence

    generator = torch.Generator().manual_seed(width)
    expected, found = (4 * torch.randn(5, width, generator=generator) for _ in range(2))
    found[1] = expected[1]  # no divergence
    found[2, 3] = 60.0  # one token takes nearly all
    expected[3, 5] = 50.0
    expected, found = expected.to(DEVICE, torch.float16), found.to(DEVICE, dtype)
    losses, gradient = divergence(expected, found)
    wanted, wanted_gradient = plain_divergence(expected, found)
    assert gradient.dtype == dtype and losses.dtype == torch.float32
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(gradient.float(), wanted_gradient.float(), rtol=1e-2, atol=1e-6)
    assert (gradient.float().sum(dim=1).abs() < 1e-2).all()


def test_rows_need_not_lie_next_to_each_other() -> None:
    from mxrot.kernels.fused.divergence import divergence

    both = torch.randn(6, 2, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found, expected = divergence(both[:, 0], both[:, 1]), plain_divergence(both[:, 0], both[:, 1])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
