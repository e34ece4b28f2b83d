import json
from itertools import product
from math import prod

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
    HadamardOfWidth,
    HadamardOfWidthSpec,
    Permutation,
    PermutationSpec,
    Sharing,
    SiteSample,
    SiteTransform,
    Stage,
    StageSpec,
    generator_for,
    spec_from_table,
    stored_tensors,
)
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.orders import factors_of, hadamard_factor, multiply_by_hadamard
from mxrot.transforms.site_transform import empty_tensors, scaled_specs, tensor_problem

K = 96


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blocks(size: int, count: int, seed: int = 1) -> BlockDiagonal:
    return BlockDiagonal(random_orthogonal(count, size, torch.Generator().manual_seed(seed)))


PERMUTATION = Permutation(torch.randperm(K, generator=torch.Generator().manual_seed(2)))
STAGES: dict[str, Stage] = {
    "blocks of 32": blocks(32, 3),
    "one matrix of 32": blocks(32, 1),
    "blocks of 48": blocks(48, 2),
    "not orthogonal": BlockDiagonal(random(3, 32, 32, seed=5)),
    "diagonal": BlockDiagonal.diagonal(torch.linspace(0.5, 2, K), 1),
    "permutation": PERMUTATION,
    "hadamard": HadamardOfWidth(),
}
SITES: dict[str, tuple[Stage, ...]] = {
    **{name: (stage,) for name, stage in STAGES.items()},
    "permutation, hadamard, blocks": (PERMUTATION, HadamardOfWidth(), blocks(32, 3)),
    "two blocks around a permutation": (blocks(48, 1), PERMUTATION, blocks(32, 3, seed=4)),
}
each = pytest.mark.parametrize("site", SITES.values(), ids=SITES)


@each
def test_the_product_is_unchanged(site: tuple[Stage, ...]) -> None:
    """x T (W T^-T)^T = x W^T, before and after the rounding of a checkpoint."""
    x, weight = random(7, K), random(11, K, seed=3)
    exact = x @ weight.T
    for transform in (SiteTransform(site), SiteTransform(site).as_applied()):
        found = transform.apply(x) @ transform.fold(weight).T
        assert found.dtype == torch.float64
        assert (found - exact).norm() <= 1e-11 * exact.norm()
        assert (transform.apply(x) - x).norm() > 0.1


@each
def test_stages_are_applied_one_after_the_other(site: tuple[Stage, ...]) -> None:
    dense = torch.eye(K, dtype=torch.float64)
    for stage in site:
        dense = dense @ stage.apply(torch.eye(K, dtype=torch.float64))
    x = random(2, 5, K)
    torch.testing.assert_close(SiteTransform(site).apply(x), x @ dense, rtol=0, atol=1e-12)


@each
def test_storing_it_twice_is_storing_it_once(site: tuple[Stage, ...]) -> None:
    applied = SiteTransform(site).as_applied()
    stored = applied.stored()
    again = SiteTransform.from_stored(applied.specs, stored)
    assert again.specs == applied.specs == SiteTransform(site).specs
    for name, tensor in again.stored().items():
        assert torch.equal(tensor, stored[name])
    x = random(3, K).float()
    assert torch.equal(bits(again.apply(x)), bits(applied.apply(x)))


@each
def test_specs_tell_the_tensors(site: tuple[Stage, ...]) -> None:
    transform = SiteTransform(site)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in transform.stored().items()}
    assert found == stored_tensors(transform.specs, K)
    empty = empty_tensors(transform.specs, K)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in empty.items()} == found
    for spec in transform.specs:
        assert spec_from_table(json.loads(json.dumps(spec.to_table()))) == spec
        assert hash(spec) == hash(spec_from_table(spec.to_table()))


def test_the_last_of_a_kind_has_the_plain_name() -> None:
    specs = (BlockDiagonalSpec(48, "site"), PermutationSpec(), BlockDiagonalSpec(32, "block"))
    shapes = {name: shape for name, (shape, _) in stored_tensors(specs, K).items()}
    assert shapes == {"weight_0": (48, 48), "order": (K,), "weight": (3, 32, 32)}


@each
def test_what_leads_is_rounded_to_the_type_of_the_inputs_once(site: tuple[Stage, ...]) -> None:
    transform, x = SiteTransform(site), random(5, K).to(torch.bfloat16)
    led = transform.lead(x)
    assert led.dtype == torch.bfloat16
    leading = site if transform.matrices is None else site[:-1]
    wide = x.float()
    for stage in leading:
        wide = stage.apply(wide)
    assert torch.equal(led, wide.to(torch.bfloat16))
    assert transform.apply(x).dtype == torch.float32


@each
def test_scaling_comes_first(site: tuple[Stage, ...]) -> None:
    scales = torch.logspace(-1, 1, K, dtype=torch.float64)
    plain = SiteTransform(site)
    scaled, x = plain.after_scaling(scales), random(4, K)
    torch.testing.assert_close(scaled.apply(x), plain.apply(x * scales), rtol=0, atol=1e-11)
    assert scaled.specs == scaled_specs(plain.specs, K)


def test_a_permutation_by_hand() -> None:
    permutation = Permutation(torch.tensor([2, 0, 1]))
    assert permutation.apply(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[3.0, 1.0, 2.0]]
    negative_zero = permutation.fold(torch.tensor([[0.0, 1.0, -0.0]]))
    assert bits(negative_zero)[0, 0] == bits(torch.tensor(-0.0, dtype=torch.float64))


ORDERS = (1, 2, 4, 12, 20, 24, 576, 896, 960, 1408, 4864, 5504, 11008, 13824, 29568)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_has_an_orthogonal_matrix(order: int) -> None:
    """On random rows: x H H^T = x, and its norm stays; H of a unit vector has entries of one size."""
    factors = factors_of(order)
    assert prod(factors) == order
    x = random(3, order)
    found = multiply_by_hadamard(x, False)
    torch.testing.assert_close(multiply_by_hadamard(found, True), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)
    unit = torch.zeros(1, order, dtype=torch.float64)
    unit[0, order // 2] = 1
    torch.testing.assert_close(
        multiply_by_hadamard(unit, False).abs(), torch.full_like(unit, order**-0.5), rtol=1e-12, atol=0
    )


SIZES = """
576 896 960 1152 1280 1408 1536 2048 2304 2560 2880 3072 3584 4096 4544 4864 5120 5376 5504 6144 6656 6912 7168 8192
8960 9216 9728 10240 10944 11008 12288 12800 13824 14336 16384 17408 17920 18432 18944 20480 21504 22016 24576 25600
27648 28672 29568 53248
"""
"""Hidden and feed-forward sizes of language models."""


def test_the_sizes_of_models_are_reached() -> None:
    """Each by the product of matrices that are exact; there and back is where it began."""
    for order in map(int, SIZES.split()):
        *paley, power = factors_of(order)
        assert prod(paley) * power == order and power & (power - 1) == 0
        for factor in paley:
            H = hadamard_factor(factor)
            assert H.abs().eq(1).all() and torch.equal(H @ H.T, factor * torch.eye(factor, dtype=torch.float64))
        x = random(1, order)
        there = multiply_by_hadamard(x, False)
        torch.testing.assert_close(multiply_by_hadamard(there, True), x, rtol=0, atol=1e-12)
        assert (there - x).abs().max() > 0.1


@pytest.mark.parametrize("order", [12, 20, 28, 36, 44, 52, 76, 104, 148, 284, 344])
def test_paleys_matrices_are_exact(order: int) -> None:
    """Entries +-1 and H H^T = n I, in whole numbers; 28 and 344 are of fields 3^3 and 7^3."""
    H = hadamard_factor(order)
    assert H.abs().eq(1).all()
    assert torch.equal(H @ H.T, order * torch.eye(order, dtype=torch.float64))


def test_the_fast_product_is_that_of_the_kronecker_matrix() -> None:
    from mxrot.transforms.orders import hadamard_matrix

    dense = torch.kron(hadamard_factor(12) / 12**0.5, hadamard_matrix(8))
    x = random(2, 3, 96)
    torch.testing.assert_close(multiply_by_hadamard(x, False), x @ dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(multiply_by_hadamard(x, True), x @ dense.T, rtol=0, atol=1e-12)
    assert not torch.allclose(dense, dense.T)


@pytest.mark.parametrize("order", [0, 3, 6, 92, 13696, 27392])
def test_an_order_that_is_not_reached_is_a_mistake(order: int) -> None:
    with pytest.raises(ConfigError, match=f"order {order} is not known") as caught:
        HadamardOfWidthSpec().check(order)
    assert ("blocks of 128 there" in str(caught.value)) == (order % 128 == 0)


def test_widths_are_whole_blocks() -> None:
    with pytest.raises(ConfigError, match="100 channels are not a multiple of 48"):
        BlockDiagonalSpec(48).tensors(100)
    with pytest.raises(ConfigError, match="block must be positive"):
        BlockDiagonalSpec(0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "kind None is not known"),
        ({"kind": "givens"}, "kind 'givens' is not known; known: block-diagonal"),
        ({"kind": "permutation", "block": 3}, r"expected the keys \[\], got \['block'\]"),
        ({"kind": "block-diagonal", "block": 32}, r"expected the keys \['block', 'sharing'\]"),
        ({"kind": "block-diagonal", "block": "32", "sharing": "site"}, "block: expected int"),
        ({"kind": "block-diagonal", "block": 32, "sharing": "row"}, "'row' is not one of"),
    ],
    ids=str,
)
def test_a_table_of_no_stage_is_a_mistake(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_table(table)


def test_damaged_tensors_are_told() -> None:
    order = torch.arange(8, dtype=torch.int32)
    assert tensor_problem("order", order) is None and tensor_problem("weight_0", torch.eye(3)) is None
    order[3] = 4
    assert tensor_problem("order_1", order) == "an order that is no permutation"
    assert tensor_problem("weight", torch.ones(2, 2)) == "a transform without an inverse"


@pytest.mark.parametrize(
    ("name", "sharing", "smoothed", "width"),
    list(product(METHODS, ("site", "block"), (False, True), (32, K))),
)
def test_a_method_installs_what_it_says(name: str, sharing: Sharing, smoothed: bool, width: int) -> None:
    method = METHODS[name]()
    specs, block = method.specs(width, sharing, smoothed), method.block_in(width)
    collectors = {need: COLLECTORS[need](block, 8, 80) for need in method.needs}
    for collector in collectors.values():
        collector.update(random(2, 40, width, seed=4).float())
    seen = {need: collector.result() for need, collector in collectors.items()}
    quantizer = TensorQuantizer(get_format("mxfp4"), get_format("mxfp4").rule())
    sample = SiteSample(random(9, width, seed=3), block, seen, quantizer, quantizer)
    own: tuple[StageSpec, ...] = ()
    if specs:
        transform = SiteTransform.of(method.fit(sample, sharing, generator_for(0, "a")))
        if smoothed and sharing == "block":
            transform = transform.after_scaling(torch.logspace(-1, 1, width, dtype=torch.float64))
        own = transform.as_applied().specs
    assert own == specs
    assert (specs == ()) == (name == "identity" and not (smoothed and sharing == "block"))
