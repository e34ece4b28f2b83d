import pytest
import torch

from mxrot.transforms.smoothing import (
    SMALLEST,
    equal_over_groups,
    moment_scales,
    per_value_row,
    smoothing_scales,
)


def test_the_formula_by_hand() -> None:
    """s = amax_x^alpha / amax_w^(1 - alpha): 16^0.75 / 81^0.25 = 8 / 3, 1 / 16^0.25 = 1/2."""
    weights = torch.tensor([[3.0, -16.0], [-81.0, 2.0]])
    got = smoothing_scales(torch.tensor([16.0, 1.0]), weights, alpha=0.75)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor([8 / 3, 0.5], dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_ends_of_alpha() -> None:
    """0 looks at the weights alone, 1 at the inputs alone."""
    inputs, weights = torch.tensor([5.0, 0.25]), torch.tensor([[2.0, 8.0]])
    assert smoothing_scales(inputs, weights, 0.0).tolist() == [0.5, 0.125]
    assert smoothing_scales(inputs, weights, 1.0).tolist() == [5.0, 0.25]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.6, 1.0])
def test_a_dead_channel_gets_a_finite_positive_scale(alpha: float) -> None:
    inputs = torch.tensor([0.0, 0.0, 1.0, 0.0])
    weights = torch.tensor([[0.0, 1.0, 0.0, 1e30]])
    scales = smoothing_scales(inputs, weights, alpha)
    assert scales.isfinite().all() and (scales >= SMALLEST).all()


def test_a_maximum_below_the_smallest_counts_as_the_smallest() -> None:
    """alpha = 1/2, so that s = sqrt(amax_x / amax_w)."""
    got = smoothing_scales(torch.tensor([0.0, SMALLEST / 9, 1.0]), torch.tensor([[1.0, 1.0, 0.0]]), alpha=0.5)
    expected = torch.tensor([SMALLEST**0.5, SMALLEST**0.5, SMALLEST**-0.5], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


def test_a_nan_input_is_not_hidden() -> None:
    assert smoothing_scales(torch.tensor([torch.nan]), torch.ones(1, 1), 0.5).isnan().all()
    assert moment_scales(torch.tensor([torch.nan]), torch.ones(1, 1), 0.5).isnan().all()


def test_moments_by_hand() -> None:
    """s = rms_x^alpha / rms_w^(1 - alpha): sqrt(81)^0.5 / sqrt((1 + 31) / 2)^0.5 = 3 / 2."""
    got = moment_scales(torch.tensor([81.0]), torch.tensor([[1.0], [-(31.0**0.5)]], dtype=torch.float64), 0.5)
    torch.testing.assert_close(got, torch.tensor([1.5], dtype=torch.float64), rtol=1e-15, atol=0)


def test_moments_make_the_product_of_energies_least() -> None:
    """Of all diagonal matrices: E|x / s|^2 |W s|^2 is (sum of rms_x rms_w)^2 there, its least by Cauchy and Schwarz."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, 8, dtype=torch.float64)
    weights = torch.randn(16, 8, generator=generator, dtype=torch.float64)

    def product(scales: torch.Tensor) -> torch.Tensor:
        return (x / scales).square().mean(0).sum() * (weights * scales).square().mean(0).sum()

    scales = moment_scales(x.square().mean(0), weights, 0.5)
    least = (x.square().mean(0) * weights.square().mean(0)).sqrt().sum().square()
    torch.testing.assert_close(product(scales), least, rtol=1e-12, atol=0)
    assert product(smoothing_scales(x.abs().amax(0), weights, 0.5)) > least
    for _ in range(10):
        assert product(scales * torch.randn(8, generator=generator, dtype=torch.float64).mul(0.1).exp()) > least


def test_moments_of_heads_meet_at_their_geometric_mean() -> None:
    shared = equal_over_groups(torch.tensor([1.0, 9.0, 4.0, 1.0]), 1, 2, "moments")
    torch.testing.assert_close(shared, torch.tensor([2.0, 3.0, 2.0, 3.0]), rtol=1e-6, atol=0)


def test_nine_heads_read_three_value_heads() -> None:
    """SmolLM2-135M: query heads 0, 1, 2 read value head 0. Channel d of head h is h * head_dim + d."""
    heads, value_heads, head_dim = 9, 3, 2
    scales = torch.tensor([[10.0 * h + d for d in range(head_dim)] for h in range(heads)]).flatten()
    shared = equal_over_groups(scales, value_heads, head_dim)
    # The largest of each group is its last head: 2, 5 and 8.
    assert shared.view(heads, head_dim).tolist() == [[10.0 * h, 10.0 * h + 1] for h in [2, 2, 2, 5, 5, 5, 8, 8, 8]]
    assert per_value_row(shared, value_heads, head_dim).tolist() == [20.0, 21.0, 50.0, 51.0, 80.0, 81.0]


def test_with_a_value_head_each_nothing_changes() -> None:
    scales = torch.rand(4 * 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(equal_over_groups(scales, 4, 8), scales)
    assert torch.equal(per_value_row(scales, 4, 8), scales)


def test_one_value_head_for_all() -> None:
    """The maximum is taken over heads, not within one."""
    scales = torch.tensor([1.0, 9.0, 4.0, 2.0])
    assert equal_over_groups(scales, 1, 2).tolist() == [4.0, 9.0, 4.0, 9.0]
    assert per_value_row(equal_over_groups(scales, 1, 2), 1, 2).tolist() == [4.0, 9.0]
