"""Data-free transforms: identity, Hadamard, randomized Hadamard, random orthogonal.

MR-GPTQ (arXiv 2509.23202) rotates each block of 32 with the same Hadamard matrix; QuaRot (2404.00456)
randomizes it with signs. Signs go on the input side, diag(s) H: on the output side they would only flip
codes and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.transforms.base import BlockTransform, Sharing, SiteSample, TransformMethod, random_orthogonal


def hadamard_matrix(size: int) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix, float64 [size, size]; ConfigError unless size is a power of two."""
    if size < 1 or size & (size - 1):
        raise ConfigError(f"a Hadamard block needs a power of two, got {size}")
    core = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(core, matrix)
    return matrix / size**0.5


def matrices_wanted(sample: SiteSample, sharing: Sharing) -> int:
    """How many matrices a transform of this sharing holds."""
    return 1 if sharing == "site" else sample.groups


@dataclass(frozen=True)
class Identity(TransformMethod):
    """No transform."""

    name = "identity"
    is_one_for_all = True

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockTransform:
        return BlockTransform.identity(sample.block, sample.device)


@dataclass(frozen=True)
class Hadamard(TransformMethod):
    """The same Hadamard matrix for every block."""

    name = "hadamard"
    is_one_for_all = True

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockTransform:
        return BlockTransform(hadamard_matrix(sample.block).to(sample.device)[None])


@dataclass(frozen=True)
class RandomHadamard(TransformMethod):
    """diag(random signs) times the Hadamard matrix."""

    name = "random-hadamard"

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockTransform:
        shape = (matrices_wanted(sample, sharing), sample.block, 1)
        signs = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
        return BlockTransform((signs * hadamard_matrix(sample.block)).to(sample.device))


@dataclass(frozen=True)
class RandomOrthogonal(TransformMethod):
    """Haar-distributed orthogonal matrices."""

    name = "random-orthogonal"

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockTransform:
        return BlockTransform(
            random_orthogonal(matrices_wanted(sample, sharing), sample.block, generator, sample.device)
        )
