"""Methods that build the input transforms of sites, what they look at, and the randomness they draw.

One matrix may serve all blocks of a site (`sharing = "site"`) or each block has its own (`sharing = "block"`).
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
    """What a transform method may look at: weights, and what calibration saw of the inputs of one site."""

    weights: Tensor
    """All weights that read the site [rows, K]: float64, or of any floating-point dtype where they are many."""
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


class BlockFormat(Protocol):
    """What a method may ask of a number format."""

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int | None:
        """Elements that share a scale; None for a whole row."""


@dataclass(frozen=True)
class FitSize:
    """How much there is to fit to at one site."""

    outputs: int
    """Rows of the weights that are fitted to together, N."""
    width: int
    """Channels, K."""
    sharing: Sharing
    tokens: int = 0
    """Of the calibration text."""
    recorded: tuple[int, ...] = ()
    """Widths of sites whose fits are recorded, to be played back; empty where nothing is."""


Work = dict[str, float]
"""Amounts by the kind of work: `float64` operations of matrix products, `fitted` units of a method's own."""


@dataclass(frozen=True)
class TransformMethod(ABC):
    """Builds the transform of one site. Fields are its options, and its keys in a recipe."""

    name: ClassVar[str]
    orthogonal: ClassVar[bool] = True
    is_one_for_all: ClassVar[bool] = False
    """Does every block get the same matrix, whatever the sharing?"""

    block: int = field(default=32, kw_only=True)
    """Channels that one matrix mixes."""

    def __post_init__(self) -> None:
        check_fields(self, f"transform {self.name}")
        if self.block < 1:
            raise ConfigError(f"transform {self.name}: block must be positive, got {self.block}")

    def check(self, weights: BlockFormat, activations: BlockFormat | None) -> None:
        """ConfigError if this method cannot work with these formats; None where inputs are not quantized."""
        return

    @property
    def multiple(self) -> int:
        """Widths that it takes are multiples of this."""
        return self.block

    def block_in(self, width: int) -> int:
        """Channels that one matrix mixes where inputs have `width`."""
        return self.block

    def own_specs(self, width: int, sharing: Sharing) -> tuple[StageSpec, ...]:
        """The stages that `fit` gives for `width` channels; none where no transform is applied."""
        block = self.block_in(width)
        is_each = sharing == "block" and not self.is_one_for_all and width > block
        return (BlockDiagonalSpec(block, "block" if is_each else "site"),)

    def specs(self, width: int, sharing: Sharing, smoothed: bool) -> tuple[StageSpec, ...]:
        """The stages that a site of `width` channels gets, known before any weight is read.

        Where it is `smoothed` and matrices are a block's own, the division by the smoothing scales is one of them.
        """
        own = self.own_specs(width, sharing)
        if not smoothed or sharing == "site":
            return own
        return scaled_specs(own or (BlockDiagonalSpec(self.block_in(width)),), width)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the calibration statistics it looks at; empty for a method that needs no data."""
        return frozenset()

    @property
    def tokens_kept(self) -> int:
        """Tokens that a statistic keeps of each block, for those that keep tokens."""
        return 0

    def beside(self, mends_later_columns: bool) -> TransformMethod:
        """This method beside a rounding whose later columns make up for what earlier ones lose, or one without."""
        return self

    @abstractmethod
    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> Stage | SiteTransform:
        """The transform; randomness comes from the CPU `generator` alone, so a seed gives the same bits."""

    def fitting_bytes(self, size: FitSize) -> float:
        """Memory that `fit` takes besides the weights and the statistics: a matrix, where it looks at neither."""
        return 8.0 * self.block**2

    def fitting_work(self, size: FitSize) -> Work:
        """What `fit` computes, as far as it takes time."""
        return {}

    def trial(self, device: torch.device) -> tuple[Callable[[], object], float] | None:
        """A fit with random numbers, to be timed, and how many `fitted` units it is; None where `fit` takes no time."""
        return None


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
