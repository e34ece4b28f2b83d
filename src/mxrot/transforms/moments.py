"""Second-moment transforms: WUSH (arXiv 2512.00956) balances and spreads the moments of both operands.

Let S_x = E[x_g^T x_g] for a block's inputs and S_w = E[w_g^T w_g] for the weight rows that read it. With
S_x = L_x L_x^T, S_w = L_w L_w^T (Cholesky) and L_w^T L_x = U S V^T (SVD), the transform is

    T = L_x^-T V S^(1/2) H,        T^T S_x T = T^-1 S_w T^-T = H^T S H

with H the orthonormal Hadamard matrix. Inputs and weights get the same second moments, their product of traces is the
least that any invertible T can reach, and H gives every channel the same share.

`brake` l is KBBQ's (2026-07): T = L_w U S^(-l/2) H = L_x^-T V S^(1 - l/2) H leaves inputs with the moments
H^T S^(2 - l) H and weights with H^T S^l H. l = 1 is the transform above.

`open` c counts the error that GPTQ cannot make up for. The rounding error of inputs meets all of S_w. The columns
behind block g make up for part of the rounding error of its weights. The rest meets the Schur complement of
M = E[x^T x] given these columns, S_open = R_gg R_gg^T with M = R R^T, R upper triangular. Both errors together are
least if S_x is replaced by S_x + c S_open. The complement is taken where GPTQ walks, of T^T M T with the T of c = 0,
plus `open_damping` of its mean diagonal, and transformed back.

With `sharing = "site"` one T serves all blocks. Each block counts by its share of the output error under an optimal
transform of its own: its moments are put on equal traces and weighted by the product of the traces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.transforms.base import FitSize, SiteSample, TransformMethod, Work
from mxrot.transforms.orders import hadamard_matrix
from mxrot.transforms.stages import BlockDiagonal, Sharing

MOST_TOGETHER = 1 << 27
"""The number of weights (1 GiB in float64) whose moments are taken at once."""

OPEN_MATRICES = 4
"""The matrices of the size of M that exist while S_open is computed: M, its transform, its reversal, and the factor."""


@dataclass(frozen=True)
class SecondMoment(TransformMethod):
    """Balances the second moments of inputs and weights."""

    name = "moments"
    orthogonal = False

    damping: float = 0.01
    """The damping added to the diagonal of both second moments, relative to its mean."""
    condition: float = math.inf
    """The largest ratio of T's singular values. Those beyond it are clipped from both ends (HiRes, arXiv 2609.34680,
    has a cap of 8)."""
    brake: float = 1.0
    """l, the share of the unevenness of the moments' product that the weights keep. 1 gives both operands the same."""
    open: float = 0.0
    """c, the weight of the moments left open by later columns, beside the full moments."""
    open_damping: float = 0.3
    """The damping of T^T M T for S_open, relative to its mean diagonal; the damping of GPTQ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        hadamard_matrix(self.block)
        if not 0 < self.damping < math.inf:
            raise ConfigError(f"transform moments: damping must be positive and finite, got {self.damping}")
        if not self.condition >= 1:
            raise ConfigError(f"transform moments: condition must be at least 1, got {self.condition}")
        if not 0 <= self.open < math.inf:
            raise ConfigError(f"transform moments: open must be finite and not negative, got {self.open}")
        if not 0 < self.open_damping < math.inf:
            raise ConfigError(f"transform moments: open_damping must be positive and finite, got {self.open_damping}")
        if not 0 <= self.brake <= 2:
            raise ConfigError(f"transform moments: brake must be from 0 to 2, got {self.brake}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"moments", "whole"} if self.open else {"moments"})

    def beside(self, mends_later_columns: bool) -> SecondMoment:
        """Without later corrections S_open is all of S_x, and S_x (1 + c) has the transform of S_x."""
        return self if mends_later_columns else replace(self, open=0.0)

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockDiagonal:
        inputs = sample.seen["moments"]
        weights = weight_moments(sample)
        if self.open:
            first = balancing_transform(inputs, weights, self.damping)
            inputs = inputs + self.open * open_moments(sample.seen["whole"], first, self.open_damping)
        if sharing == "site":
            inputs, weights = shared_moments(inputs, weights)
        found = balancing_transform(inputs, weights, self.damping, self.brake)
        return found if math.isinf(self.condition) else conditioned(found, self.condition)

    def fitting_bytes(self, size: FitSize) -> float:
        """The bytes of the weights in blocks; of many weights, those taken at once, also in float64."""
        count = size.outputs * size.width
        whole = OPEN_MATRICES * 8.0 * size.width**2 if self.open else 0.0
        return whole + (8.0 * count if count <= MOST_TOGETHER else 16.0 * MOST_TOGETHER)

    def fitting_work(self, size: FitSize) -> Work:
        """Units are transforms of one block."""
        transforms = 1 if size.sharing == "site" else size.width // self.block
        found = {"fitted": float(transforms), "float64": 2.0 * size.outputs * size.width * self.block}
        return found | ({"factor": float(size.width**3)} if self.open else {})

    def trial(self, device: torch.device) -> tuple[Callable[[], object], float]:
        draws = torch.Generator(device).manual_seed(0)
        factors = torch.randn(32, self.block, self.block, dtype=torch.float64, device=device, generator=draws)
        moments = factors @ factors.mT
        return partial(balancing_transform, moments, moments, self.damping), float(len(moments))


def weight_moments(sample: SiteSample) -> Tensor:
    """S_w of each block: float64 [G, B, B]."""
    channels = sample.block * max(1, MOST_TOGETHER // (len(sample.weights) * sample.block))
    found = []
    for weights in sample.weights.split(channels, dim=1):
        blocks = weights.double().unflatten(-1, (-1, sample.block)).transpose(0, 1)
        found.append(blocks.transpose(1, 2) @ blocks / len(sample.weights))
    return torch.cat(found)


def shared_moments(inputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """One S_x and one S_w [1, B, B] for all blocks, from those of each [G, B, B]."""
    input_traces, weight_traces = _traces(inputs), _traces(weights)
    is_alive = (input_traces > 0) & (weight_traces > 0)
    ratio = torch.where(is_alive, (weight_traces / input_traces).sqrt(), 0.0)
    inverse = torch.where(is_alive, (input_traces / weight_traces).sqrt(), 0.0)
    # The sizes that the equal traces have removed.
    whole = (torch.where(is_alive, weight_traces, 0.0).sum() / torch.where(is_alive, input_traces, 0.0).sum()).sqrt()
    whole = torch.where(is_alive.any(), whole, 1.0)
    return (inputs * ratio).mean(dim=0, keepdim=True) / whole, (weights * inverse).mean(dim=0, keepdim=True) * whole


def balancing_transform(inputs: Tensor, weights: Tensor, damping: float, brake: float = 1.0) -> BlockDiagonal:
    """T from the second moments S_x and S_w, both [n, B, B] and symmetric. A block with zero moments in either gets
    H."""
    size = inputs.shape[-1]
    rotation = hadamard_matrix(size).to(inputs)
    lower_x = torch.linalg.cholesky(_damped(inputs, damping))
    lower_w = torch.linalg.cholesky(_damped(weights, damping))
    _, singular, right_t = torch.linalg.svd(lower_w.mT @ lower_x)
    right_t = right_t * _sign_of_largest(right_t)
    share = singular.sqrt() if brake == 1 else singular ** (1 - brake / 2)
    spread = (right_t.mT * share[:, None, :]) @ rotation
    found = torch.linalg.solve_triangular(lower_x.mT, spread, upper=True)
    dead = (_traces(inputs) == 0) | (_traces(weights) == 0)
    return BlockDiagonal(torch.where(dead, rotation, found))


def open_moments(whole: Tensor, first: BlockDiagonal, damping: float) -> Tensor:
    """S_open of each block: float64 [G, B, B], from M [K, K].

    It is taken of T^T M T, with T being `first`, plus `damping` of its mean diagonal, and transformed back to the
    channels of M.
    """
    matrices = first.matrices
    size = matrices.shape[-1]
    count = len(whole) // size
    half = (whole.unflatten(1, (count, size)).movedim(1, 0) @ matrices).movedim(0, 1).flatten(1)  # M T
    moved = (matrices.mT @ half.unflatten(0, (count, size))).flatten(0, 1)
    del half
    mean = moved.diagonal().mean()
    moved.diagonal().add_(damping * torch.where(mean > 0, mean, torch.ones_like(mean)))
    factor = torch.linalg.cholesky(moved.flip(0, 1)).flip(0, 1)
    del moved
    own = factor.unflatten(0, (count, size)).unflatten(2, (count, size)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    inverse = torch.linalg.inv(matrices)
    rows = inverse.mT @ own
    return rows @ rows.mT


def conditioned(transform: BlockDiagonal, condition: float) -> BlockDiagonal:
    """T with its singular values clipped to a ratio of `condition` around their geometric mean."""
    left, singular, right = torch.linalg.svd(transform.matrices)
    middle = singular.log().mean(dim=-1, keepdim=True).exp()
    clipped = (singular / middle).clamp(condition**-0.5, condition**0.5) * middle
    return BlockDiagonal(left * clipped[:, None, :] @ right)


def _damped(moments: Tensor, damping: float) -> Tensor:
    mean = _traces(moments) / moments.shape[-1]
    added = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return moments + added * torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)


def _traces(moments: Tensor) -> Tensor:
    """Traces: [n, B, B] to [n, 1, 1]."""
    return moments.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None]


def _sign_of_largest(rows: Tensor) -> Tensor:
    """+-1 for each row [..., n, 1]. The signs of singular vectors are arbitrary, and H mixes the vectors."""
    largest = rows.abs().argmax(dim=-1, keepdim=True)
    return rows.gather(-1, largest).sign()
