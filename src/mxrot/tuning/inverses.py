"""Inverses of many small matrices by products alone, in few launches on a GPU.

A library's inverse launches about a hundred operations and, if deterministic, sorts indices: on a GPU a quarter of the
time of a tuning step (docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 20
"""Enough for matrices with |R|_1 |R|_inf / s^2 up to 30,000, where s is the least singular value. Corrections of
transforms stay near 1."""


def inverses(matrices: Tensor) -> Tensor:
    """R^-1 of each of `matrices` [G, B, B], float64.

    Newton's iteration X <- 2 X - X R X (Schulz 1933) from X = R^T / (|R|_1 |R|_inf), where it always converges. It
    corrects its own rounding errors.
    """
    r = matrices.to(torch.float64)
    size = r.abs()
    bound = size.sum(dim=-1).amax(dim=-1) * size.sum(dim=-2).amax(dim=-1)
    x = r.mT / bound[:, None, None]
    for _ in range(ROUNDS):
        x = torch.baddbmm(x, x, r @ x, beta=2, alpha=-1)
    return x
