"""What every transform method owes under both sharings."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from tests.oracles.sample_blocks import bits
from torch import Tensor

from mxrot.calibration import COLLECTORS
from mxrot.errors import ConfigError
from mxrot.formats import TensorQuantizer, get_format
from mxrot.transforms import (
    METHODS,
    BlockDiagonal,
    BlockDiagonalSpec,
    FitSize,
    Permutation,
    Sharing,
    SiteSample,
    SiteTransform,
    Stage,
    TransformMethod,
    generator_for,
    get_transform,
    stored_tensors,
)
from mxrot.transforms.stages import STORED_DTYPE

BLOCK, GROUPS = 32, 3
WIDTH = BLOCK * GROUPS
EPSILON = torch.finfo(torch.float64).eps


def has_one_stage(name: str) -> bool:
    """Is what a method gives one matrix a block?"""
    return all(isinstance(spec, BlockDiagonalSpec) for spec in METHODS[name]().own_specs(WIDTH, "block"))


each = pytest.mark.parametrize(
    ("name", "sharing"), [(name, sharing) for name in METHODS for sharing in ("site", "block")]
)
each_of_one_stage = pytest.mark.parametrize(
    ("name", "sharing"), [(name, sharing) for name in METHODS if has_one_stage(name) for sharing in ("site", "block")]
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs() -> Tensor:
    """Two batches [2, windows, tokens, K] with an outlier channel in the first and the last block."""
    x = random(2, 3, 40, WIDTH, seed=1)
    x[..., 5] *= 30
    x[..., -2] *= -80
    return x.float()


@cache
def fit(name: str, sharing: Sharing, seed: int = 0, site: str = "a.q_proj") -> SiteTransform:
    return refit(name, sharing, generator_for(seed, site))


def refit(name: str, sharing: Sharing, generator: torch.Generator) -> SiteTransform:
    return SiteTransform.of(fitted(METHODS[name](block=BLOCK), sharing, generator))


def only_stage(name: str, sharing: Sharing, seed: int = 0) -> BlockDiagonal:
    (stage,) = fit(name, sharing, seed).stages
    assert isinstance(stage, BlockDiagonal)
    return stage


def fitted(method: TransformMethod, sharing: Sharing, generator: torch.Generator) -> Stage | SiteTransform:
    collectors = {need: COLLECTORS[need](method.block, method.tokens_kept, 512) for need in method.needs}
    for batch in inputs():
        for collector in collectors.values():
            collector.update(batch)
    format = get_format("mxfp4")
    sample = SiteSample(
        random(48, WIDTH, seed=2),
        method.block,
        {need: collector.result() for need, collector in collectors.items()},
        TensorQuantizer(format, format.rule()),
    )
    return method.fit(sample, sharing, generator)


def as_dense(transform: SiteTransform | Stage) -> Tensor:
    """The transform of a whole row, [K, K]."""
    return transform.apply(torch.eye(WIDTH, dtype=torch.float64))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@each
def test_it_is_what_was_promised(name: str, sharing: Sharing) -> None:
    """One matrix a site; with one a block, a method whose matrices are all equal may still give one."""
    found = fit(name, sharing)
    promised = METHODS[name](block=BLOCK).own_specs(WIDTH, sharing)
    assert found.specs == promised if promised else name == "identity"
    for stage in found.stages:
        if isinstance(stage, BlockDiagonal):
            assert stage.matrices.dtype == torch.float64
            assert stage.matrices.shape[0] in ((1,) if sharing == "site" else (1, GROUPS))


@each
def test_its_inverse_undoes_it(name: str, sharing: Sharing) -> None:
    """|T T^-1 - I| of an inverse by LU is bounded by B eps cond(T), times a small constant, for each stage."""
    transform = fit(name, sharing)
    dense, inverse_transpose = as_dense(transform), transform.fold(torch.eye(WIDTH, dtype=torch.float64))
    error = (dense @ inverse_transpose.T - torch.eye(WIDTH, dtype=torch.float64)).abs().max()
    assert error <= 4 * len(transform.stages) * BLOCK * EPSILON * float(torch.linalg.cond(dense))


@each
def test_it_is_orthogonal_where_its_method_says_so(name: str, sharing: Sharing) -> None:
    dense = as_dense(fit(name, sharing))
    error = float((dense @ dense.T - torch.eye(WIDTH, dtype=torch.float64)).abs().max())
    # 512 factors, each orthogonal to B eps.
    assert (error <= 512 * BLOCK * EPSILON) == METHODS[name]().orthogonal


@each
def test_the_product_is_unchanged(name: str, sharing: Sharing) -> None:
    transform, x, weight = fit(name, sharing), random(7, WIDTH), random(11, WIDTH, seed=3)
    got = transform.apply(x) @ transform.fold(weight).T
    assert got.dtype == torch.float64
    assert relative_error(got, x @ weight.T) <= 1e-12


@each
def test_the_product_is_unchanged_by_the_matrices_of_a_checkpoint(name: str, sharing: Sharing) -> None:
    """Rounding T to bfloat16 costs nothing, because the weights are folded against the rounded one."""
    applied = fit(name, sharing).as_applied()
    for stage in applied.stages:
        if isinstance(stage, BlockDiagonal):
            assert torch.equal(stage.matrices, stage.matrices.to(STORED_DTYPE).double())
    x, weight = random(7, WIDTH), random(11, WIDTH, seed=3)
    assert relative_error(applied.apply(x) @ applied.fold(weight).T, x @ weight.T) <= 1e-12


@each
def test_rounding_for_a_checkpoint_twice_is_rounding_once(name: str, sharing: Sharing) -> None:
    exact = fit(name, sharing)
    once = exact.as_applied()
    twice = once.as_applied()
    assert torch.equal(bits(as_dense(twice)), bits(as_dense(once)))
    for rounded, stage in zip(once.stages, exact.stages, strict=True):
        if isinstance(stage, BlockDiagonal) and isinstance(rounded, BlockDiagonal):
            # sqrt(B) T to bfloat16, and back: two roundings, each relative to 2^-8 at most.
            assert ((rounded.matrices - stage.matrices).abs() <= 2.0**-7 * 1.01 * stage.matrices.abs()).all()


@each
def test_the_stored_shapes(name: str, sharing: Sharing) -> None:
    transform = fit(name, sharing)
    stored = transform.stored()
    assert {key: (tuple(value.shape), value.dtype) for key, value in stored.items()} == stored_tensors(
        transform.specs, WIDTH
    )
    again = SiteTransform.from_stored(transform.specs, stored)
    assert again.specs == transform.specs
    assert torch.equal(bits(as_dense(again)), bits(as_dense(transform.as_applied())))


@each_of_one_stage
def test_the_stored_shape(name: str, sharing: Sharing) -> None:
    transform = only_stage(name, sharing)
    stored = transform.to_stored()
    assert stored.dtype == STORED_DTYPE
    expected = (BLOCK, BLOCK) if len(transform.matrices) == 1 else (GROUPS, BLOCK, BLOCK)
    assert stored.shape == expected
    assert BlockDiagonal.from_stored(stored).matrices.shape == transform.matrices.shape


@each
def test_it_is_one_matrix(name: str, sharing: Sharing) -> None:
    transform, x = fit(name, sharing), random(2, 5, WIDTH)
    assert relative_error(transform.apply(x), x @ as_dense(transform)) <= 1e-13
    folded = transform.fold(x[0])
    assert relative_error(folded, x[0] @ torch.linalg.inv(as_dense(transform)).T) <= 1e-12


@each_of_one_stage
def test_it_acts_on_each_block_by_itself(name: str, sharing: Sharing) -> None:
    transform, x = only_stage(name, sharing), random(2, 5, WIDTH)
    dense = torch.block_diag(*transform.matrices.expand(GROUPS, BLOCK, BLOCK))
    assert relative_error(transform.apply(x), x @ dense) <= 1e-14


def rounding_bound(transform: SiteTransform, x: Tensor) -> Tensor:
    """Of |found - x T|: a stage of matrices sums B products in float32, of matrices rounded to it, so that each of the
    B + 1 roundings is half a unit; a permutation rounds nothing; the last one of several reads the type of `x`."""
    error, size = torch.zeros(x.shape, dtype=torch.float64), x.double().abs()
    for number, stage in enumerate(transform.stages):
        if number and number == len(transform.stages) - 1 and transform.matrices is not None:
            error += 0.5 * torch.finfo(x.dtype).eps * (size + error)
        dense = as_dense(stage).abs()
        summed = BLOCK if isinstance(stage, BlockDiagonal) else WIDTH
        share = 0.0 if isinstance(stage, Permutation) else (summed + 1) * 2.0**-24 * 1.01
        size, error = size @ dense, error @ dense + share * ((size + error) @ dense)
    if transform.matrices is None:  # what comes out has the type of `x`
        error += 0.5 * torch.finfo(x.dtype).eps * (size + error)
    return error


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_input_is_transformed_in_float32(name: str, sharing: Sharing, dtype: torch.dtype) -> None:
    transform, x = fit(name, sharing), random(6, WIDTH).to(dtype)
    got = transform.apply(x)
    assert got.dtype == torch.float32
    assert ((got.double() - x.double() @ as_dense(transform)).abs() <= rounding_bound(transform, x)).all()


@each_of_one_stage
def test_composition_applies_the_first_first(name: str, sharing: Sharing) -> None:
    first, then = only_stage("random-orthogonal", "block", seed=5), only_stage(name, sharing)
    x, weight = random(7, WIDTH), random(11, WIDTH, seed=3)
    both = first.compose(then)
    assert relative_error(both.apply(x), then.apply(first.apply(x))) <= 1e-13
    assert relative_error(both.fold(weight), then.fold(first.fold(weight))) <= 1e-12
    if name != "identity":
        assert relative_error(then.compose(first).apply(x), both.apply(x)) > 0.1


@each_of_one_stage
def test_composition_is_associative(name: str, sharing: Sharing) -> None:
    a, b, c = only_stage("random-orthogonal", "block"), only_stage(name, sharing), only_stage("random-hadamard", "site")
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    assert relative_error(left.matrices, right.matrices) <= 1e-14


@each
def test_randomness_comes_from_the_seed_and_the_name_alone(name: str, sharing: Sharing) -> None:
    generator = generator_for(0, "a.q_proj")
    before = generator.get_state()
    torch.manual_seed(99)
    again = as_dense(refit(name, sharing, generator))
    assert torch.equal(bits(again), bits(as_dense(fit(name, sharing))))

    is_random = not torch.equal(generator.get_state(), before)
    for other in (fit(name, sharing, seed=1), fit(name, sharing, site="b.q_proj")):
        assert torch.equal(as_dense(other), again) != is_random


@each
def test_it_mixes_as_many_channels_as_it_is_told(name: str, sharing: Sharing) -> None:
    """16 in the place of 32: what is fitted is what is promised, and the product is unchanged. Or it mixes all of them,
    and takes no number."""
    if METHODS[name]().multiple == 1:
        with pytest.raises(ConfigError, match=f"transform {name}: mixes all channels, so block = 16 says nothing"):
            METHODS[name](block=16)
        return
    method = METHODS[name](block=16)
    found = SiteTransform.of(fitted(method, sharing, generator_for(0, "a.q_proj")))
    promised = method.own_specs(WIDTH, sharing)
    assert found.specs == promised if promised else name == "identity"
    assert all(spec.multiple == 16 for spec in found.specs if isinstance(spec, BlockDiagonalSpec))
    x, weight = random(7, WIDTH), random(11, WIDTH, seed=3)
    assert relative_error(found.apply(x) @ found.fold(weight).T, x @ weight.T) <= 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_fitting_takes(name: str) -> None:
    """Twice the channels are twice the work; what takes time can be timed, in units that are counted."""
    method = METHODS[name]()
    small, large = (FitSize(48, width, "block", tokens=512) for width in (96, 192))
    assert method.fitting_bytes(large) > 0
    work, more = method.fitting_work(small), method.fitting_work(large)
    assert work.keys() == more.keys() and all(more[kind] > work[kind] for kind in work)
    trial = method.trial(torch.device("cpu"))
    assert ("fitted" in work) == (trial is not None)
    if trial is not None:
        fit_some, units = trial
        assert units > 0
        fit_some()


@pytest.mark.parametrize("block", [0, -32, 2.5, "32"])
@pytest.mark.parametrize("name", METHODS)
def test_a_block_that_is_none_is_a_mistake(name: str, block: object) -> None:
    with pytest.raises(ConfigError, match="block"):
        METHODS[name](block=block)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_random_blocks_of_a_site_differ(name: str) -> None:
    for stage in fit(name, "block").stages:
        if isinstance(stage, BlockDiagonal) and len(stage.matrices) > 1:
            assert all((a - b).abs().max() > 0.1 for a, b in pairwise(stage.matrices))


@pytest.mark.parametrize("name", METHODS)
def test_it_is_registered_under_its_name(name: str) -> None:
    assert get_transform(name).name == name
    assert METHODS[name]().needs <= COLLECTORS.keys()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"^unknown transform 'hadamrad'; did you mean 'hadamard' .* known: hadamard, "
    ):
        get_transform("hadamrad")
