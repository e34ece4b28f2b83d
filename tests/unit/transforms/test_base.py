import math
from hashlib import sha256

import pytest
import torch
from tests.oracles.sample_blocks import bits

from mxrot.transforms import BlockDiagonal, generator_for
from mxrot.transforms.base import orthonormalized, random_orthogonal
from mxrot.transforms.stages import apply_matrices


def test_apply_by_hand() -> None:
    """x' = x T with row vectors, T of each block its own."""
    matrices = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [-1.0, 5.0]]], dtype=torch.float64)
    x = torch.tensor([[1.0, 10.0, 2.0, 1.0]], dtype=torch.float64)
    assert BlockDiagonal(matrices).apply(x).tolist() == [[31.0, 42.0, -1.0, 7.0]]
    shared = BlockDiagonal(matrices[:1]).apply(x)
    assert shared.tolist() == [[31.0, 42.0, 5.0, 8.0]]


def test_fold_by_hand() -> None:
    """W' = W T^-T: with T = [[1, 2], [0, 1]], T^-T = [[1, 0], [-2, 1]]."""
    transform = BlockDiagonal(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]], dtype=torch.float64))
    weight = torch.tensor([[3.0, 5.0, 1.0, 1.0]])
    assert transform.fold(weight).tolist() == [[-7.0, 5.0, -1.0, 1.0]]
    assert transform.fold(weight).dtype == torch.float64


def test_a_diagonal_divides_inputs_and_multiplies_weights() -> None:
    scales = torch.tensor([0.5, 4.0, 2.0, 8.0])
    transform = BlockDiagonal.diagonal(1 / scales, block=2)
    ones = torch.ones(1, 4, dtype=torch.float64)
    assert transform.matrices.shape == (2, 2, 2)
    assert transform.apply(ones).tolist() == [[2.0, 0.25, 0.5, 0.125]]
    assert transform.fold(ones).tolist() == [scales.tolist()]


def test_identity_changes_no_bit() -> None:
    x = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    transform = BlockDiagonal.identity(32)
    assert torch.equal(transform.apply(x), x) and torch.equal(transform.fold(x), x)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (1, 2, 3, 8)], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_dimensions(shape: tuple[int, ...], count: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices = torch.randn(count, 4, 4, generator=torch.Generator().manual_seed(1))
    got = apply_matrices(x, matrices)
    assert got.shape == shape
    rows = [torch.cat([row[:4] @ matrices[0], row[4:] @ matrices[count - 1]]) for row in x.reshape(-1, 8).unbind()]
    expected = torch.stack(rows).view(shape) if rows else x
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_a_stored_matrix_is_read_alike_after_being_stored_again(block: int) -> None:
    """Over every finite bfloat16 number: what a runtime applies survives another round of storing."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    stored = patterns[patterns.isfinite()]
    stored = stored[: len(stored) // block**2 * block**2].view(-1, block, block)
    applied = BlockDiagonal.from_stored(stored)
    again = applied.as_applied()
    assert torch.equal(bits(again.matrices), bits(applied.matrices))
    # Half a unit of bfloat16, or of its subnormal numbers; the division in float32 may move a tie.
    exact = stored.double() / math.sqrt(block)
    bound = (exact.abs() * 2.0**-8).clamp(min=2.0**-134) * (1 + 2.0**-15)
    assert ((applied.matrices - exact).abs() <= bound).all()


def test_a_hadamard_matrix_is_stored_exactly() -> None:
    """sqrt(B) T is what is kept, so that entries of +-1/sqrt(B) are +-1 in the file."""
    from mxrot.transforms.orders import hadamard_matrix

    stored = BlockDiagonal(hadamard_matrix(32)[None]).to_stored()
    assert stored.abs().eq(1).all()


def test_the_generator_is_a_hash_of_seed_and_name() -> None:
    digest = sha256(b"3/model.layers.0.mlp.down_proj").digest()
    expected = int.from_bytes(digest[:8], "little") >> 1
    assert generator_for(3, "model.layers.0.mlp.down_proj").initial_seed() == expected
    seeds = {generator_for(seed, name).initial_seed() for seed in range(9) for name in ("a", "b", "")}
    assert len(seeds) == 27


@pytest.mark.parametrize("size", [1, 2, 31, 32])
def test_random_orthogonal_matrices_are_orthogonal(size: int) -> None:
    """To B eps; both signs of the determinant occur, and no entry of the first column keeps a sign."""
    q = random_orthogonal(64, size, torch.Generator().manual_seed(4))
    assert q.shape == (64, size, size) and q.dtype == torch.float64
    gram = q @ q.transpose(-1, -2)
    assert (gram - torch.eye(size, dtype=torch.float64)).abs().max() <= 4 * size * 2.0**-52
    determinants = torch.linalg.det(q)
    assert (determinants.abs() - 1).abs().max() <= 1e-12
    assert (determinants > 0).any() and (determinants < 0).any()
    # Without the sign correction LAPACK's diagonal entries lean to one side.
    positive = (q[:, 0, 0] > 0).sum()
    assert 16 <= positive <= 48


def test_orthonormalized_is_the_q_of_lapack() -> None:
    """With R's diagonal positive Q is unique, up to the condition number; and orthogonal for hopeless matrices too."""
    matrices = torch.randn(200, 31, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    q, r = torch.linalg.qr(matrices)
    expected = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    condition = torch.linalg.cond(matrices)
    found = orthonormalized(matrices)
    assert ((found - expected).abs().amax(dim=(1, 2)) <= 100 * 2.0**-52 * condition).all()
    left, _, right = torch.linalg.svd(matrices)
    singular = left * torch.logspace(0, -11, 31, dtype=torch.float64) @ right
    for awkward in (matrices, singular, matrices * 1e-30, matrices * 1e30):
        q = orthonormalized(awkward)
        assert ((q.mT @ q - torch.eye(31)).abs() <= 100 * 2.0**-52).all()


def test_random_orthogonal_matrices_have_the_moments_of_the_haar_measure() -> None:
    """E[q_ij] = 0 and E[q_ij^2] = 1/n; over 4000 draws the means stay within 5 standard errors."""
    count, size = 4000, 4
    q = random_orthogonal(count, size, torch.Generator().manual_seed(5))
    assert q.mean(0).abs().max() < 5 * math.sqrt(1 / size / count)
    # var(q^2) = 2 (n - 1) / (n^2 (n + 2))
    deviation = math.sqrt(2 * (size - 1) / (size**2 * (size + 2)) / count)
    assert (q.square().mean(0) - 1 / size).abs().max() < 5 * deviation
