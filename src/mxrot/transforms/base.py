"""Methods that build the input transforms of sites, with their data and their random numbers.

One matrix may serve all blocks of a site (`sharing = "site"`), or each block has its own (`sharing = "block"`).
Everything here is float64.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from mxrot.cuda_graphs import Replays
from mxrot.errors import ConfigError
from mxrot.transforms.site_transform import SiteTransform, scaled_specs
from mxrot.transforms.stages import BlockDiagonalSpec, Sharing, Stage, StageSpec
from mxrot.typed import check_fields


@dataclass(frozen=True)
class SiteSample:
    """The data for a transform method: weights, and statistics of the inputs of one site."""

    weights: Tensor
    """All weights that read the site, [rows, K]: float64, or any floating-point dtype if they are many."""
    block: int
    seen: dict[str, Tensor] = field(default_factory=dict)
    """The statistics, by the names that the method lists in `needs`."""
    fake_quantize: Callable[[Tensor], Tensor] | None = None
    """The quantizer of the activations at run time."""
    fake_quantize_weight: Callable[[Tensor], Tensor] | None = None
    """Rounds weights to nearest under their rule."""
    replay: Replays = field(default_factory=Replays)
    """Replays long chains of small operations. The sites of a run share it."""

    @property
    def groups(self) -> int:
        return self.weights.shape[-1] // self.block

    @property
    def device(self) -> torch.device:
        return self.weights.device


class BlockFormat(Protocol):
    """The parts of a number format that a method may read."""

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int | None:
        """The elements that share a scale; None for a whole row."""


@dataclass(frozen=True)
class FitSize:
    """The size of the fit at one site."""

    outputs: int
    """The rows of the weights that are fitted together, N."""
    width: int
    """The number of channels, K."""
    sharing: Sharing
    tokens: int = 0
    """The tokens of the calibration text."""
    recorded: tuple[int, ...] = ()
    """The widths of sites whose fits are recorded and replayed; empty if nothing is recorded."""


Work = dict[str, float]
"""Amounts by the kind of work: `float64` operations of matrix products, and `fitted` units that a method defines."""


@dataclass(frozen=True)
class TransformMethod(ABC):
    """Builds the transform of one site. Fields are its options, and its keys in a recipe."""

    name: ClassVar[str]
    orthogonal: ClassVar[bool] = True
    is_one_for_all: ClassVar[bool] = False
    """True if every block gets the same matrix, whatever the sharing."""

    block: int = field(default=32, kw_only=True)
    """The channels that one matrix mixes."""

    def __post_init__(self) -> None:
        check_fields(self, f"transform {self.name}")
        if self.block < 1:
            raise ConfigError(f"transform {self.name}: block must be positive, got {self.block}")

    def check(self, weights: BlockFormat, activations: BlockFormat | None) -> None:
        """Raise ConfigError if this method cannot work with these formats. None means that inputs are not quantized."""
        return

    @property
    def multiple(self) -> int:
        """The width of a site must be a multiple of this."""
        return self.block

    def block_in(self, width: int) -> int:
        """The channels that one matrix mixes if inputs have `width` channels."""
        return self.block

    def own_specs(self, width: int, sharing: Sharing) -> tuple[StageSpec, ...]:
        """The stages that `fit` gives for `width` channels; none if no transform is applied."""
        block = self.block_in(width)
        is_each = sharing == "block" and not self.is_one_for_all and width > block
        return (BlockDiagonalSpec(block, "block" if is_each else "site"),)

    def specs(self, width: int, sharing: Sharing, smoothed: bool) -> tuple[StageSpec, ...]:
        """The stages of a site of `width` channels, known before any weight is read.

        If the site is `smoothed` and each block has its own matrix, the division by the smoothing scales is part of
        them.
        """
        own = self.own_specs(width, sharing)
        if not smoothed or sharing == "site":
            return own
        return scaled_specs(own or (BlockDiagonalSpec(self.block_in(width)),), width)

    @property
    def needs(self) -> frozenset[str]:
        """The names of the calibration statistics it reads; empty for a method that needs no data."""
        return frozenset()

    @property
    def tokens_kept(self) -> int:
        """The tokens that a statistic keeps of each block, for statistics that keep tokens."""
        return 0

    def beside(self, mends_later_columns: bool) -> TransformMethod:
        """This method for a rounding whose later columns make up for the errors of earlier ones, or for one without
        that."""
        return self

    @abstractmethod
    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> Stage | SiteTransform:
        """The fitted transform. Randomness comes only from the CPU `generator`, so a seed gives the same bits."""

    def fitting_bytes(self, size: FitSize) -> float:
        """The memory that `fit` takes besides weights and statistics. The default, for methods without either, is one
        matrix."""
        return 8.0 * self.block**2

    def fitting_work(self, size: FitSize) -> Work:
        """The work of `fit` that takes noticeable time."""
        return {}

    def trial(self, device: torch.device) -> tuple[Callable[[], object], float] | None:
        """A fit with random numbers, to be timed, and its size in `fitted` units. None if `fit` takes no time."""
        return None


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends only on `seed` and `name`, not on earlier draws."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_orthogonal(count: int, size: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """`count` Haar-distributed orthogonal matrices, float64 [count, size, size] on `device`.

    They are the Q of Gaussian matrices, with R's diagonal positive (Mezzadri, arXiv math-ph/0609050). The Gaussians are
    drawn on the CPU, in float32, by `generator`.
    """
    gaussian = torch.randn(count, size, size, generator=generator)
    return orthonormalized(gaussian.to(device).double())


def orthonormalized(matrices: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal of R, for a batch of float64 matrices [n, B, B].

    It takes three rounds of Cholesky QR, the first one shifted (Fukaya et al., arXiv 1809.11085, section 3). LAPACK
    takes the matrices of a batch one by one; this takes them together. Q is orthogonal to a few units of rounding up to
    a condition number of 1e12, which one in 1e10 Gaussian matrices exceeds.
    """
    q = matrices
    for shift in (1e-12, 0.0, 0.0):
        gram = q.mT @ q
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal += shift * diagonal.sum(dim=-1, keepdim=True)
        lower, _ = torch.linalg.cholesky_ex(gram)
        q = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)
    return q
