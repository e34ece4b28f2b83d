"""The factor of an inverse Hessian that GPTQ walks along.

A Hessian of 28672 channels takes 6.6 GB, so copies are limited. Beside the Hessian there is one that is factorized in
place, and one that starts as the identity and ends as the inverse of the factor.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mxrot.errors import NumericsError

Measure = Literal["mean", "largest"]
"""What a damping is relative to: the mean diagonal of a Hessian, or its largest eigenvalue (Qronos, arXiv
2505.11695)."""

ATTEMPTS = 4
POWER_ROUNDS = 64
"""The rounds of the power method, enough to add a share of the largest eigenvalue."""
COPIED_ELEMENTS = 1 << 24
"""The number of elements reversed at once: what a flip allocates."""


def inverse_factor(
    hessian: Tensor, damping: float, name: str, overwrites: bool = False, relative_to: Measure = "mean"
) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + damping * mean(diag H) I)^-1, float64, and the damping that was used.

    With `relative_to` "largest", the largest eigenvalue of H replaces the mean of its diagonal.

    `hessian` [K, K] is symmetric positive semidefinite. With J the reversal of the channel order and J H J = L L^T, U
    is J L^-1 J: one Cholesky factorization, without an explicit inverse of H.
    If it fails, the damping grows tenfold, at most three times. Then NumericsError, with `name`, is raised.

    It takes two more matrices of that size, one of them U. With `overwrites` it takes one, and H is lost.
    """
    finite = torch.stack(hessian.aminmax()).isfinite().all()  # avoids a matrix of magnitudes
    matrix = hessian.double()
    scale = damping_unit(matrix, relative_to)
    work = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    lower = work.mT  # LAPACK's column order, so nothing is copied for it
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    used = damping
    for attempt in range(ATTEMPTS):
        used = damping * 10**attempt
        _copy_reversed(matrix, lower)
        work.add_(0.0)  # turns -0 into +0, as adding a matrix would
        work.diagonal().add_(used * scale)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        # The only wait for the device. What was computed from NaN is discarded.
        if bool(finite & (failed == 0)):
            inverse = _identity(matrix, overwrites)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            _copy_reversed(inverse, work)
            return work, used
        if not finite:
            raise NumericsError(
                f"{name}: the Hessian of its inputs holds NaN or Inf; check the calibration activations"
            )
    raise NumericsError(
        f"{name}: the Hessian of its inputs cannot be factorized even with damping {used:g} of its mean diagonal; "
        "use more calibration samples, or rounding rtn"
    )


def damping_unit(matrix: Tensor, relative_to: Measure) -> Tensor:
    """What a damping of 1 adds to the diagonal of a Hessian [K, K]: a scalar; 1 if the Hessian is zero."""
    unit = matrix.diagonal().mean() if relative_to == "mean" else largest_eigenvalue(matrix)
    # If all inputs are zero, any positive multiple of the identity makes GPTQ equal to rounding to nearest.
    return torch.where(unit > 0, unit, torch.ones_like(unit))


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """A lower bound of the largest eigenvalue of a positive semidefinite matrix [K, K].

    It is the Rayleigh quotient after the power method, started from the row of the largest diagonal entry, which is not
    orthogonal to the large eigenvectors.
    """
    vector = _unit(matrix[matrix.diagonal().argmax()])
    for _ in range(POWER_ROUNDS):
        vector = _unit(matrix @ vector)
    return vector @ (matrix @ vector)


def _unit(vector: Tensor) -> Tensor:
    """The vector scaled to length 1; zero stays zero."""
    return vector / torch.linalg.vector_norm(vector).clamp(min=torch.finfo(vector.dtype).tiny)


def _identity(matrix: Tensor, overwrites: bool) -> Tensor:
    """The identity in column-major order; in the memory of `matrix` if that may be overwritten."""
    taken = matrix if overwrites and matrix.is_contiguous() else torch.empty_like(matrix)
    return taken.zero_().fill_diagonal_(1).mT


def _copy_reversed(source: Tensor, target: Tensor) -> None:
    """Write J S J of a matrix [K, K], some rows at a time."""
    width = len(source)
    rows = max(1, COPIED_ELEMENTS // max(1, width))
    for start in range(0, width, rows):
        stop = min(start + rows, width)
        target[start:stop] = source[width - stop : width - start].flip(0, 1)
