"""Gradient steps on orthogonal matrices (Cayley SGD: Li, Fuxin and Todorovic, arXiv 2002.01113, section 4; as used by
SpinQuant, 2405.16406, section 3.2).

With G the gradient for R and What = G R^T - (1/2) R (R^T G R^T), the skew matrix A = What - What^T gives the curve
    R(s) = (I + (s/2) A)^-1 (I - (s/2) A) R.
It stays orthogonal, and the loss along it falls by s |A|^2 at first (Frobenius). Square matrices have R R^T = I, so
What = (1/2) G R^T, which is computed here.

The inverse is not computed: R(s) is the fixed point of Y = R - (s/2) A (R + Y). With s at most 1 / |A|_1, each round at
least halves the distance to it. The remaining distance would add up over the steps, so each step ends with Q of a QR
decomposition. The paper's code does this at random in one step of a hundred.
"""

from __future__ import annotations

from torch import Tensor

from mxrot.transforms.base import orthonormalized

ROUNDS = 5
"""The rounds of the fixed-point iteration."""


def cayley_step(matrices: Tensor, gradients: Tensor, rate: float) -> Tensor:
    """Orthogonal matrices after a step against these gradients, all float64 [n, D, D]. The step of each is
    min(rate, 1 / |A|_1)."""
    A = skew_direction(matrices, gradients)
    steps = step_sizes(A, rate)
    return orthonormalized(cayley_curve(matrices, A, steps))


def skew_direction(matrices: Tensor, gradients: Tensor) -> Tensor:
    """A of each matrix [n, D, D]."""
    what = gradients @ matrices.mT / 2
    return what - what.mT


def step_sizes(A: Tensor, rate: float) -> Tensor:
    """The steps [n] for skew matrices [n, D, D]; |A|_1 is the largest absolute column sum."""
    return A.abs().sum(dim=-2).amax(dim=-1).reciprocal().clamp(max=rate)


def cayley_curve(matrices: Tensor, A: Tensor, steps: Tensor, rounds: int = ROUNDS) -> Tensor:
    """R(s) by fixed-point iteration, from its tangent R - s A R; [n, D, D] for steps [n]."""
    half = A * (steps[:, None, None] / 2)
    found = matrices - 2 * half @ matrices
    for _ in range(rounds):
        found = matrices - half @ (matrices + found)
    return found
