import pytest
import torch
from tests.live_bytes import LiveBytes
from torch import Tensor

from mxrot.errors import NumericsError
from mxrot.rounding import linalg
from mxrot.rounding.linalg import inverse_factor
from mxrot.transforms.base import random_orthogonal


def with_eigenvalues(values: list[float]) -> Tensor:
    """Symmetric, not diagonal, float64; its mean diagonal is the mean of `values`."""
    q = random_orthogonal(1, len(values), torch.Generator().manual_seed(0))[0]
    matrix = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
    return (matrix + matrix.T) / 2


def indefinite(lowest: float, size: int = 12) -> Tensor:
    """Mean diagonal 1, lowest eigenvalue `lowest`."""
    rest = (size - lowest) / (size - 1)
    return with_eigenvalues([lowest] + [rest] * (size - 1))


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_it_factors_the_damped_inverse(size: int) -> None:
    """Upper triangular U with a positive diagonal and U^T U (H + d I) = I."""
    x = torch.randn(3 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(0, 2, size, dtype=torch.float64)
    hessian = x.T @ x
    factor, used = inverse_factor(hessian, 0.05, "q_proj")
    assert used == 0.05
    assert torch.equal(factor, factor.triu()) and (factor.diagonal() > 0).all()
    identity = torch.eye(size, dtype=torch.float64)
    damped = hessian + 0.05 * hessian.diagonal().mean() * identity
    # An LU-free bound: n eps cond on either side of the product.
    bound = 8 * size * 2.0**-52 * float(torch.linalg.cond(damped))
    assert (factor.T @ factor @ damped - identity).abs().max() <= bound


def test_a_singular_hessian_is_what_damping_is_for() -> None:
    """Fewer tokens than channels, and a dead channel."""
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[:, 5] = 0
    factor, used = inverse_factor(x.T @ x, 0.01, "q_proj")
    assert used == 0.01 and factor.isfinite().all()
    assert factor[5, :5].abs().sum() == 0 and factor[5, 6:].abs().max() <= 1e-12 * factor[5, 5]


@pytest.mark.parametrize("hessian", [torch.zeros(6, 6), 7.5 * torch.eye(6), 1e-30 * torch.eye(6)], ids=str)
def test_a_multiple_of_the_identity_has_no_entry_off_the_diagonal(hessian: Tensor) -> None:
    factor, used = inverse_factor(hessian, 0.01, "q_proj")
    assert used == 0.01 and factor.dtype == torch.float64
    assert torch.equal(factor, torch.diag(factor.diagonal()))
    assert (factor.diagonal() > 0).all() and factor.isfinite().all()


@pytest.mark.parametrize(("lowest", "expected"), [(-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_damping_grows_tenfold_until_it_works(lowest: float, expected: float) -> None:
    hessian = indefinite(lowest)
    factor, used = inverse_factor(hessian, 0.01, "q_proj")
    assert used == pytest.approx(expected, rel=1e-12)
    damped = hessian + used * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-10, atol=1e-10)


def test_after_four_attempts_it_names_the_layer() -> None:
    message = (
        r"^model\.layers\.3\.mlp\.down_proj: .* cannot be factorized even with damping 10 of its mean diagonal; use "
    )
    with pytest.raises(NumericsError, match=message):
        inverse_factor(indefinite(-50.0), 0.01, "model.layers.3.mlp.down_proj")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_hessian_that_is_not_finite_names_the_layer(bad: float) -> None:
    hessian = torch.eye(4)
    hessian[1, 2] = bad
    with pytest.raises(NumericsError, match=r"^k_proj: the Hessian of its inputs holds NaN or Inf; check "):
        inverse_factor(hessian, 0.01, "k_proj")


def textbook_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The same with a matrix for every step."""
    identity = torch.eye(len(hessian), dtype=torch.float64)
    for used in (damping * 10**attempt for attempt in range(4)):
        damped = hessian + used * hessian.diagonal().mean() * identity
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).contiguous(), used
    raise AssertionError


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("size", [1, 3, 31, 32, 33, 64, 127, 200, 256, 320, 576])
@pytest.mark.parametrize("lowest", [0.5, -0.05, -0.5])
def test_in_place_it_is_bit_for_bit_what_it_is_step_by_step(
    size: int, lowest: float, overwrites: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where damping has to grow, too; of a sum over tokens, which rounding leaves not quite symmetric; with -0."""
    monkeypatch.setattr(linalg, "COPIED_ELEMENTS", 5 * size)
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2 * size, size, dtype=torch.float64, generator=generator)
    hessian = x.T @ (x * (1 + 1e-9 * torch.rand(2 * size, 1, dtype=torch.float64, generator=generator)))
    if size > 1:
        hessian[0, -1] = hessian[-1, 0] = -0.0
        least = torch.linalg.eigvalsh(hessian)[0]
        hessian.diagonal().add_(lowest * hessian.diagonal().mean() - least)
    before = hessian.clone()
    expected, damping = textbook_factor(hessian, 0.01)
    factor, used = inverse_factor(hessian, 0.01, "q_proj", overwrites)
    assert used == damping and factor.is_contiguous()
    assert torch.equal(factor.view(torch.int64), expected.view(torch.int64))
    assert overwrites or torch.equal(hessian.view(torch.int64), before.view(torch.int64))


@pytest.mark.parametrize(("overwrites", "matrices"), [(False, 2), (True, 1)])
def test_it_takes_no_more_matrices_than_it_says(
    overwrites: bool, matrices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "COPIED_ELEMENTS", 1 << 12)
    hessian = torch.eye(256, dtype=torch.float64)
    with LiveBytes() as alive:
        inverse_factor(hessian, 0.01, "q_proj", overwrites)
    assert 1 + matrices <= alive.peak / hessian.nbytes < 1 + matrices + 0.1
