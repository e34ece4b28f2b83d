import math

import pytest
import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.transforms import SiteSample
from mxrot.transforms.hadamard import RandomHadamard
from mxrot.transforms.orders import hadamard_matrix


def recursive_hadamard(size: int) -> list[list[int]]:
    """H_2n = [[H, H], [H, -H]], H_1 = 1."""
    if size == 1:
        return [[1]]
    half = recursive_hadamard(size // 2)
    return [row + row for row in half] + [row + [-entry for entry in row] for row in half]


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64])
def test_it_is_the_recursive_definition(size: int) -> None:
    got = hadamard_matrix(size)
    assert got.dtype == torch.float64
    expected = torch.tensor(recursive_hadamard(size), dtype=torch.float64) / math.sqrt(size)
    assert torch.equal(got, expected)
    assert torch.equal(got, got.T)
    # B products of 1/B, each with one rounding.
    assert (got @ got - torch.eye(size, dtype=torch.float64)).abs().max() <= size * 2.0**-53


@pytest.mark.parametrize("size", [0, -4, 3, 12, 24, 48])
def test_only_powers_of_two(size: int) -> None:
    with pytest.raises(ConfigError, match=f"needs a power of two, got {size}"):
        hadamard_matrix(size)


def signs_of(transform: Tensor) -> Tensor:
    """s of T = diag(s) H, from T H^T = diag(s)."""
    recovered = transform @ hadamard_matrix(transform.shape[-1]).T
    signs = recovered.diagonal(dim1=-2, dim2=-1).round()
    assert (recovered - torch.diag_embed(signs)).abs().max() <= 1e-14
    return signs


def test_random_signs_are_on_the_input_side() -> None:
    """On the output side they would flip codes and change nothing."""
    sample = SiteSample(torch.zeros(1, 4 * 32, dtype=torch.float64), 32)
    for sharing, count in (("site", 1), ("block", 4)):
        transform = RandomHadamard().fit(sample, sharing, torch.Generator().manual_seed(0))
        signs = signs_of(transform.matrices)
        assert signs.shape == (count, 32) and signs.abs().eq(1).all()
        assert signs.amin() == -1 and signs.amax() == 1
        assert len({tuple(row) for row in signs.tolist()}) == count
