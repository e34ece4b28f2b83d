"""The factor of an inverse Hessian that GPTQ walks along."""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.errors import NumericsError

ATTEMPTS = 4


def inverse_factor(hessian: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + damping * mean(diag H) I)^-1, float64, and the damping that was used.

    `hessian` [K, K] is symmetric positive semidefinite. With J the reversal of the order of the channels and
    J H J = L L^T, U is J L^-1 J: one Cholesky factorization, and no explicit inverse of H.
    If it fails the damping grows tenfold, at most three times; then NumericsError with `name`.
    """
    if not torch.isfinite(hessian).all():
        raise NumericsError(f"{name}: the Hessian of its inputs holds NaN or Inf; check the calibration activations")
    matrix = hessian.double()
    mean_diagonal = matrix.diagonal().mean()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    # All inputs zero: any positive multiple of the identity leaves GPTQ equal to rounding to nearest.
    scale = torch.where(mean_diagonal > 0, mean_diagonal, torch.ones_like(mean_diagonal))
    used = damping
    for attempt in range(ATTEMPTS):
        used = damping * 10**attempt
        lower, failed = torch.linalg.cholesky_ex((matrix + used * scale * identity).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).contiguous(), used
    raise NumericsError(
        f"{name}: the Hessian of its inputs cannot be factorized even with damping {used:g} of its mean diagonal; "
        "use more calibration samples, or rounding rtn"
    )
