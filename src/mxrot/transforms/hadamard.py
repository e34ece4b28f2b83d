"""Data-free transforms: identity, Hadamard, randomized Hadamard, random orthogonal.

MR-GPTQ (arXiv 2509.23202) rotates each block of 32 with the same Hadamard matrix. QuaRot (2404.00456) randomizes it
with signs. Signs go on the input side, diag(s) H: on the output side they would only flip the signs of codes and change
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxrot.transforms.base import SiteSample, TransformMethod, random_orthogonal
from mxrot.transforms.orders import hadamard_matrix
from mxrot.transforms.stages import BlockDiagonal, Sharing, StageSpec


def matrices_wanted(sample: SiteSample, sharing: Sharing) -> int:
    """The number of matrices in a transform with this sharing."""
    return 1 if sharing == "site" else sample.groups


@dataclass(frozen=True)
class Identity(TransformMethod):
    """No transform."""

    name = "identity"
    is_one_for_all = True

    def own_specs(self, width: int, sharing: Sharing) -> tuple[StageSpec, ...]:
        return ()

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockDiagonal:
        return BlockDiagonal.identity(sample.block, sample.device)


@dataclass(frozen=True)
class Hadamard(TransformMethod):
    """The same Hadamard matrix for every block."""

    name = "hadamard"
    is_one_for_all = True

    def __post_init__(self) -> None:
        super().__post_init__()
        hadamard_matrix(self.block)

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockDiagonal:
        return BlockDiagonal(hadamard_matrix(sample.block).to(sample.device)[None])


@dataclass(frozen=True)
class RandomHadamard(TransformMethod):
    """diag(random signs) times the Hadamard matrix."""

    name = "random-hadamard"

    def __post_init__(self) -> None:
        super().__post_init__()
        hadamard_matrix(self.block)

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockDiagonal:
        shape = (matrices_wanted(sample, sharing), sample.block, 1)
        signs = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
        return BlockDiagonal((signs * hadamard_matrix(sample.block)).to(sample.device))


@dataclass(frozen=True)
class RandomOrthogonal(TransformMethod):
    """Haar-distributed orthogonal matrices."""

    name = "random-orthogonal"

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockDiagonal:
        return BlockDiagonal(
            random_orthogonal(matrices_wanted(sample, sharing), sample.block, generator, sample.device)
        )
