"""The second-moment transform: the algebra that defines it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.calibration.statistics import BlockMoments
from mxrot.errors import ConfigError
from mxrot.recipe import load_recipe
from mxrot.transforms import moments
from mxrot.transforms.base import SiteSample
from mxrot.transforms.moments import SecondMoment, balancing_transform, shared_moments, weight_moments
from mxrot.transforms.orders import hadamard_matrix
from mxrot.transforms.stages import BlockDiagonal, Sharing

B, GROUPS = 16, 5


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uneven(rows: int, seed: int) -> Tensor:
    """Rows [rows, GROUPS * B] with correlated channels of very different sizes."""
    sizes = torch.logspace(-2, 2, GROUPS * B, dtype=torch.float64)
    shuffled = sizes[torch.randperm(GROUPS * B, generator=torch.Generator().manual_seed(seed))]
    return random(rows, GROUPS * B, seed=seed) @ (random(GROUPS * B, GROUPS * B, seed=seed + 1)) * shuffled


def moments_of(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(-1, (-1, B)).transpose(0, 1)
    return blocks.mT @ blocks / len(rows)


def fitted(x: Tensor, weight: Tensor, sharing: Sharing = "block", damping: float = 0.01) -> BlockDiagonal:
    sample = SiteSample(weight, B, {"moments": moments_of(x)})
    return SecondMoment(damping).fit(sample, sharing, torch.Generator())


def damped(moments: Tensor, damping: float) -> Tensor:
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    return moments + damping * mean * torch.eye(B, dtype=torch.float64)


def traces(transform: BlockDiagonal, x: Tensor, weight: Tensor) -> Tensor:
    """tr(T^T S_x T) tr(T^-1 S_w T^-T) of each block."""
    moved_x = moments_of(transform.apply(x)).diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return moved_x * moments_of(transform.fold(weight)).diagonal(dim1=-2, dim2=-1).sum(dim=-1)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 0.3])
def test_inputs_and_weights_get_the_same_spread_out_moments(damping: float) -> None:
    x, weight = uneven(400, seed=0), uneven(300, seed=10)
    transform = fitted(x, weight, damping=damping)
    T, T_inverse = transform.matrices, torch.linalg.inv(transform.matrices)
    of_x = T.mT @ damped(moments_of(x), damping) @ T
    of_weight = T_inverse @ damped(moments_of(weight), damping) @ T_inverse.mT
    scale = of_x.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    assert ((of_x - of_weight).abs() <= 1e-7 * scale).all()
    assert ((of_x.diagonal(dim1=-2, dim2=-1) - scale[..., 0]).abs() <= 1e-7 * scale[..., 0]).all()


def test_no_other_transform_has_a_smaller_product_of_traces() -> None:
    """Against the identity, smoothing with a Hadamard matrix, neighbours of T and random matrices."""
    x, weight = uneven(400, seed=1), uneven(300, seed=11)
    best = traces(fitted(x, weight, damping=1e-9), x, weight)
    found = fitted(x, weight, damping=1e-9).matrices
    ratio = (weight.square().mean(dim=0) / x.square().mean(dim=0)) ** 0.25
    smoothing = BlockDiagonal.diagonal(ratio, B).compose(BlockDiagonal(hadamard_matrix(B)[None]))
    others = [BlockDiagonal.identity(B), smoothing]
    others += [BlockDiagonal(found @ (torch.eye(B) + 0.05 * random(B, B, seed=seed))) for seed in range(20)]
    others += [BlockDiagonal(random(GROUPS, B, B, seed=seed)) for seed in range(20)]
    for other in others:
        assert (traces(other, x, weight) >= best * (1 - 1e-9)).all()


@pytest.mark.parametrize("sharing", ["site", "block"])
def test_sizes_of_inputs_and_weights_cancel(sharing: Sharing) -> None:
    """Twice the inputs, three times the weights: another balance, the same transform but for its size."""
    x, weight = uneven(400, seed=2), uneven(300, seed=12)
    one, other = fitted(x, weight, sharing).matrices, fitted(2 * x, 3 * weight, sharing).matrices
    torch.testing.assert_close(other, one * (3 / 2) ** 0.5, rtol=1e-6, atol=0)


def test_of_one_block_the_site_is_the_block() -> None:
    x, weight = uneven(400, seed=3)[:, :B], uneven(300, seed=13)[:, :B]
    torch.testing.assert_close(
        fitted(x, weight, "site").matrices, fitted(x, weight, "block").matrices, rtol=1e-9, atol=1e-12
    )


def test_a_shared_transform_is_for_the_blocks_that_matter() -> None:
    """A block a million times smaller in both operands leaves the transform as it is; a dead one does too."""
    x, weight = uneven(400, seed=4), uneven(300, seed=14)
    x[:, :B] *= 1e-6
    weight[:, :B] *= 1e-6
    without = shared_moments(moments_of(x[:, B:]), moments_of(weight[:, B:]))
    for factor in (1.0, 0.0):
        x[:, :B] *= factor
        inputs, weights = shared_moments(moments_of(x), moments_of(weight))
        for found, expected in zip((inputs, weights), without, strict=True):
            torch.testing.assert_close(found * GROUPS, expected * (GROUPS - 1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("sharing", ["site", "block"])
def test_a_dead_site_gets_the_hadamard_matrix(sharing: Sharing) -> None:
    weight = uneven(30, seed=5)
    for x, w in ((torch.zeros(9, GROUPS * B).double(), weight), (weight, torch.zeros_like(weight))):
        matrices = fitted(x, w, sharing).matrices
        assert torch.equal(matrices, hadamard_matrix(B).expand_as(matrices))


def test_fewer_tokens_than_channels_are_enough() -> None:
    transform = fitted(uneven(3, seed=6), uneven(2, seed=16))
    identity = torch.eye(B, dtype=torch.float64).expand(GROUPS, -1, -1)
    assert ((transform.matrices @ transform.inverse_transposes.mT - identity).abs() <= 1e-9).all()


def test_signs_of_singular_vectors_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = moments_of(uneven(400, seed=7)), moments_of(uneven(300, seed=17))
    expected = balancing_transform(x, weight, 0.01).matrices
    svd = torch.linalg.svd

    def flipped(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = svd(matrix)
        signs = random(*values.shape, seed=0).sign()
        return left * signs[:, None, :], values, right * signs[:, :, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert torch.equal(balancing_transform(x, weight, 0.01).matrices, expected)


def test_the_statistics_are_means_over_all_batches() -> None:
    batches = [random(2, 7, GROUPS * B, seed=seed).float() for seed in range(3)]
    collector = BlockMoments(B)
    for batch in batches:
        collector.update(batch)
    expected = moments_of(torch.cat(batches).flatten(0, 1).double())
    torch.testing.assert_close(collector.result(), expected, rtol=0, atol=1e-6)
    weight = random(6, GROUPS * B, seed=9)
    assert torch.equal(weight_moments(SiteSample(weight, B)), moments_of(weight))


@pytest.mark.parametrize("damping", [0.0, -1.0, float("inf"), float("nan")])
def test_damping_must_be_positive(damping: float) -> None:
    with pytest.raises(ConfigError, match="damping must be positive"):
        SecondMoment(damping)


def test_singular_values_are_brought_within_a_ratio() -> None:
    """Around their geometric mean; those within stay, and so do the directions."""
    x, weight = uneven(400, seed=8), uneven(300, seed=18)
    free = fitted(x, weight).matrices
    sample = SiteSample(weight, B, {"moments": moments_of(x)})
    for condition in (1.0, 8.0, 1e9):
        capped = SecondMoment(condition=condition).fit(sample, "block", torch.Generator()).matrices
        before, after = torch.linalg.svdvals(free), torch.linalg.svdvals(capped)
        middle = before.log().mean(dim=-1, keepdim=True).exp()
        expected = before.clamp(middle * condition**-0.5, middle * condition**0.5)
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=0)
        # The polar factor that is a rotation is the same: T^T T' is symmetric and positive.
        product = free.mT @ capped
        torch.testing.assert_close(product, product.mT, rtol=1e-8, atol=1e-10)
    assert float((torch.linalg.cond(free)).max()) > 8
    torch.testing.assert_close(capped, free, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("condition", [0.5, float("nan")])
def test_a_ratio_below_one_is_none(condition: float) -> None:
    with pytest.raises(ConfigError, match="condition must be at least 1"):
        SecondMoment(condition=condition)


@pytest.mark.parametrize("together", [1, 40 * B * 2, 1 << 27])
def test_moments_of_many_weights_are_taken_some_blocks_after_the_other(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bfloat16 as of the same numbers in float64."""
    weight = torch.randn(40, 5 * B, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = weight_moments(SiteSample(weight.double(), B))
    monkeypatch.setattr(moments, "MOST_TOGETHER", together)
    found = weight_moments(SiteSample(weight, B))
    assert found.dtype == torch.float64 and torch.equal(found, expected)


def sample_of(x: Tensor, weight: Tensor) -> SiteSample:
    return SiteSample(weight, B, {"moments": moments_of(x), "whole": x.T @ x / len(x)})


@pytest.mark.parametrize("brake", [0.0, 0.5, 0.75, 1.0, 2.0])
def test_a_brake_shares_the_singular_values_out(brake: float) -> None:
    """Inputs get H^T S^(2 - l) H and weights H^T S^l H, and T is L_w U S^(-l/2) H up to signs of singular vectors."""
    x, weight = uneven(400, seed=0), uneven(300, seed=10)
    of_x, of_weight = (damped(moments_of(rows), 0.01) for rows in (x, weight))
    T = SecondMoment(brake=brake).fit(sample_of(x, weight), "block", torch.Generator()).matrices
    lower_x, lower_w = torch.linalg.cholesky(of_x), torch.linalg.cholesky(of_weight)
    left, singular, _ = torch.linalg.svd(lower_w.mT @ lower_x)
    H, T_inverse = hadamard_matrix(B), torch.linalg.inv(T)
    for power, found in ((2 - brake, T.mT @ of_x @ T), (brake, T_inverse @ of_weight @ T_inverse.mT)):
        expected = H.T @ (singular**power).diag_embed() @ H
        assert ((found - expected).abs().amax(dim=(1, 2)) <= 1e-7 * expected.abs().amax(dim=(1, 2))).all()
    kbbq = lower_w @ left @ (singular ** (-brake / 2)).diag_embed()
    signs = (kbbq.mT @ torch.linalg.inv(kbbq @ kbbq.mT) @ (T @ H.T)).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), rtol=1e-6, atol=0)


def test_a_brake_of_one_changes_no_bit() -> None:
    sample = sample_of(uneven(400, seed=0), uneven(300, seed=10))
    plain, braked = (one.fit(sample, "block", torch.Generator()) for one in (SecondMoment(), SecondMoment(brake=1)))
    inputs, weights = sample.seen["moments"], weight_moments(sample)
    assert torch.equal(plain.matrices, braked.matrices)
    assert torch.equal(plain.matrices, balancing_transform(inputs, weights, 0.01).matrices)


def test_what_is_open_is_what_later_blocks_cannot_mend() -> None:
    """The Schur complement, with an explicit inverse: M_gg - M_gl M_ll^-1 M_lg, l the channels behind block g."""
    x = uneven(400, seed=0)
    whole = x.T @ x / len(x)
    found = moments.open_moments(whole, BlockDiagonal.identity(B), 0.01)
    whole = whole + 0.01 * whole.diagonal().mean() * torch.eye(len(whole), dtype=torch.float64)
    for group in range(GROUPS):
        own, later = slice(group * B, (group + 1) * B), slice((group + 1) * B, GROUPS * B)
        mended = whole[own, later] @ torch.linalg.inv(whole[later, later]) @ whole[later, own]
        assert (found[group] - (whole[own, own] - mended)).abs().max() <= 1e-9 * whole.abs().max()
        assert group == GROUPS - 1 or mended.abs().max() > 0.01 * whole[own, own].abs().max()


def test_what_is_open_moves_with_the_channels() -> None:
    """Under any T of blocks the same, but for what is added to the diagonal."""
    x = random(400, GROUPS * B, seed=0) @ random(GROUPS * B, GROUPS * B, seed=1)
    whole = x.T @ x / len(x) + torch.eye(GROUPS * B, dtype=torch.float64)
    plain = moments.open_moments(whole, BlockDiagonal.identity(B), 1e-13)
    moved = moments.open_moments(whole, BlockDiagonal(random(GROUPS, B, B, seed=5)), 1e-13)
    assert (plain - moved).abs().max() <= 1e-7 * plain.abs().max()


@pytest.mark.parametrize("c", [0.5, 1.0])
def test_both_errors_together_are_least(c: float) -> None:
    """tr(T^T (S_x + c S_open) T) tr(T^-1 S_w T^-T) of each block, beside c = 0 and neighbours of T."""
    x, weight = uneven(400, seed=0), uneven(300, seed=10)
    sample = sample_of(x, weight)
    options = {"damping": 1e-9, "open_damping": 1e-6}
    found = SecondMoment(open=c, **options).fit(sample, "block", torch.Generator()).matrices
    first = SecondMoment(**options).fit(sample, "block", torch.Generator())
    assert SecondMoment(open=c).needs == {"moments", "whole"} and SecondMoment().needs == {"moments"}
    wanted = moments_of(x) + c * moments.open_moments(sample.seen["whole"], first, 1e-6)

    def cost(T: Tensor) -> Tensor:
        inverse = torch.linalg.inv(T)
        left, right = T.mT @ wanted @ T, inverse @ moments_of(weight) @ inverse.mT
        return left.diagonal(dim1=-2, dim2=-1).sum(dim=-1) * right.diagonal(dim1=-2, dim2=-1).sum(dim=-1)

    best = cost(found)
    others = [first.matrices, *(found @ (torch.eye(B) + 0.05 * random(B, B, seed=seed)) for seed in range(20))]
    for other in others:
        assert (cost(other) >= best * (1 - 1e-6)).all()
    assert (cost(first.matrices) > best * (1 + 5e-5)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"brake": -0.1}, "brake must be from 0 to 2"),
        ({"brake": float("nan")}, "brake must be from 0 to 2"),
        ({"open": -1.0}, "open must be finite and not negative"),
        ({"open_damping": 0.0}, "open_damping must be positive and finite"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SecondMoment(**options)


def test_without_a_walk_over_columns_all_of_the_moments_are_open() -> None:
    """And twice the moments have the transform of once the moments."""
    recipe = load_recipe("mxrot")
    assert recipe.transform.beside(recipe.rounding.mends_later_columns) == recipe.transform
    for changes in ({"rounding.method": "rtn"}, {"rounding.scales": "fixed", "rounding.columns": "descending"}):
        one = recipe.changed(changes)
        found = one.transform.beside(one.rounding.mends_later_columns)
        assert found == SecondMoment(brake=0.75) and "whole" not in found.needs
    sample = sample_of(uneven(200, seed=1), random(24, GROUPS * B, seed=2))
    once = balancing_transform(sample.seen["moments"], weight_moments(sample), 0.01).matrices
    twice = balancing_transform(2 * sample.seen["moments"], weight_moments(sample), 0.01).matrices
    torch.testing.assert_close(twice / twice.norm(), once / once.norm())
