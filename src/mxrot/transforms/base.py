"""Block transforms, and the methods that build them.

A block transform holds T_g for each block g of B channels. It acts on row vectors, its inverse transpose on the
weights of everything that reads them (METHOD: x'_g = x_g T_g, W'_g = W_g T_g^-T), so that in exact arithmetic
x' W'^T = x W^T. One matrix may serve all blocks of a site (`sharing = "site"`) or each block has its own
(`sharing = "block"`). Everything here is float64.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mxrot.cuda_graphs import Replays
from mxrot.typed import check_fields

Sharing = Literal["site", "block"]

STORED_DTYPE = torch.bfloat16
"""The type that a checkpoint keeps sqrt(B) T in, and that runtimes apply T in."""


@dataclass(frozen=True, eq=False)
class BlockTransform:
    """x_g -> x_g T_g for each block g."""

    matrices: Tensor
    """T, float64 [1, B, B] (shared by all blocks) or [G, B, B]."""

    @staticmethod
    def identity(block: int, device: torch.device | str = "cpu") -> BlockTransform:
        return BlockTransform(torch.eye(block, dtype=torch.float64, device=device)[None])

    @staticmethod
    def diagonal(values: Tensor, block: int) -> BlockTransform:
        """x_j -> x_j * values_j; `values` [K] with K a multiple of `block`."""
        return BlockTransform(torch.diag_embed(values.double().unflatten(0, (-1, block))))

    @property
    def block(self) -> int:
        return self.matrices.shape[-1]

    @cached_property
    def inverse_transposes(self) -> Tensor:
        """T^-T, float64, shape of `matrices`."""
        return torch.linalg.inv(self.matrices).transpose(-1, -2)

    def compose(self, after: BlockTransform) -> BlockTransform:
        """The transform that applies this one first, then `after`."""
        return BlockTransform(self.matrices @ after.matrices)

    def apply(self, x: Tensor) -> Tensor:
        """x T, blocks along the last dimension; float64 input in float64, all others in float32."""
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        return apply_matrices(x.to(work), self.matrices.to(work))

    def fold(self, weight: Tensor) -> Tensor:
        """W T^-T in float64 for `weight` [N, K]."""
        return apply_matrices(weight.double(), self.inverse_transposes)

    def to_stored(self) -> Tensor:
        """bf16(sqrt(B) T), [B, B] where all blocks share T, else [G, B, B]."""
        stored = (self.matrices * math.sqrt(self.block)).to(STORED_DTYPE)
        return stored[0] if stored.shape[0] == 1 else stored

    @staticmethod
    def from_stored(stored: Tensor) -> BlockTransform:
        """What a runtime applies: bf16(stored / sqrt(B)), the division in float32, as float64."""
        effective = (stored.float() / math.sqrt(stored.shape[-1])).to(STORED_DTYPE).double()
        return BlockTransform(effective if effective.dim() == 3 else effective[None])

    def as_applied(self) -> BlockTransform:
        """This transform after the rounding of a checkpoint: fold weights against this one."""
        return self.from_stored(self.to_stored())


def apply_matrices(x: Tensor, matrices: Tensor) -> Tensor:
    """x_g @ matrices_g for x [..., G * B] and matrices [1 | G, B, B] of the same dtype."""
    blocks = x.unflatten(-1, (-1, matrices.shape[-1]))
    if matrices.shape[0] == 1:
        return (blocks @ matrices[0]).flatten(-2)
    return torch.einsum("...gb,gbc->...gc", blocks, matrices).flatten(-2)


@dataclass(frozen=True)
class SiteSample:
    """What a transform method may look at: weights, and what calibration saw of the inputs of one site."""

    weights: Tensor
    """All weights that read the site, float64 [rows, K]."""
    block: int
    seen: dict[str, Tensor] = field(default_factory=dict)
    """Statistics by the name under which the method asked for them in `needs`."""
    fake_quantize: Callable[[Tensor], Tensor] | None = None
    """The run-time quantizer of the activations."""
    fake_quantize_weight: Callable[[Tensor], Tensor] | None = None
    """Rounding the weights to nearest under their rule."""
    replay: Replays = field(default_factory=Replays)
    """Plays back long chains of small operations; shared by the sites of a run."""

    @property
    def groups(self) -> int:
        return self.weights.shape[-1] // self.block

    @property
    def device(self) -> torch.device:
        return self.weights.device


@dataclass(frozen=True)
class TransformMethod(ABC):
    """Builds the transform of one site. Fields are its options, and its keys in a recipe."""

    name: ClassVar[str]
    orthogonal: ClassVar[bool] = True
    is_one_for_all: ClassVar[bool] = False
    """Does every block get the same matrix, whatever the sharing?"""

    def __post_init__(self) -> None:
        check_fields(self, f"transform {self.name}")

    @property
    def needs(self) -> frozenset[str]:
        """Names of the calibration statistics it looks at; empty for a method that needs no data."""
        return frozenset()

    @abstractmethod
    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockTransform:
        """The transform; randomness comes from the CPU `generator` alone, so a seed gives the same bits."""


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on `seed` and `name` only, not on what was drawn before."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_orthogonal(count: int, size: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """`count` Haar-distributed orthogonal matrices, float64 [count, size, size] on `device`.

    The Q of Gaussian matrices, with R's diagonal positive (Mezzadri, arXiv math-ph/0609050). They are drawn on the
    CPU, in float32, by `generator`.
    """
    gaussian = torch.randn(count, size, size, generator=generator)
    return orthonormalized(gaussian.to(device).double())


def orthonormalized(matrices: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal of R, for a batch of float64 matrices [n, B, B].

    Three rounds of Cholesky QR, the first one shifted (Fukaya et al., arXiv 1809.11085, section 3): LAPACK takes the
    matrices of a batch one by one, this takes them together. Orthogonal to a few units of rounding up to a condition
    number of 1e12, which one in 1e10 Gaussian matrices exceeds.
    """
    q = matrices
    for shift in (1e-12, 0.0, 0.0):
        gram = q.mT @ q
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal += shift * diagonal.sum(dim=-1, keepdim=True)
        lower, _ = torch.linalg.cholesky_ex(gram)
        q = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)
    return q
