from dataclasses import replace

import pytest
import torch
from tests.unit.surgery.tiny_llama import first_block, load_weights, run_first_block, tiny_llama, weights_of
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.models import Site, value_heads
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.surgery import fold_into_producer, shareable_scales

SITES = {site.name: site for site in LLAMA.sites}
sites = pytest.mark.parametrize("site", SITES.values(), ids=SITES)


def scales_for(site: Site, seed: int = 2) -> Tensor:
    """Positive, over four orders of magnitude."""
    channels = weights_of(first_block(tiny_llama()))[site.linears[0]].shape[1]
    exponents = torch.rand(channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 10 ** (4 * exponents - 2)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("heads", [4, 2, 1], ids=lambda heads: f"{heads}kv")
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@sites
def test_a_block_computes_the_same(site: Site, biases: bool, heads: int) -> None:
    model = tiny_llama(value_heads=heads, biases=biases)
    block, shape = first_block(model), value_heads(model.config)
    expected = run_first_block(model)
    weights = weights_of(block)
    before = {name: weight.clone() for name, weight in weights.items()}

    scales = shareable_scales(scales_for(site), site, shape)
    fold_into_producer(block, site, weights, scales, shape, torch.float64)
    load_weights(block, weights)
    assert relative_error(run_first_block(model), expected) <= 1e-12

    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed == {*site.linears, *([site.producer] if site.producer else [])}
    for linear in site.linears:
        torch.testing.assert_close(weights[linear], before[linear] * scales, rtol=1e-15, atol=0)


def test_all_sites_one_after_the_other() -> None:
    """up_proj and v_proj are readers of one site and the producers of another."""
    model = tiny_llama(biases=True)
    block, shape = first_block(model), value_heads(model.config)
    expected, weights = run_first_block(model), weights_of(first_block(model))
    for seed, site in enumerate(LLAMA.sites):
        scales = shareable_scales(scales_for(site, seed), site, shape)
        fold_into_producer(block, site, weights, scales, shape, torch.float64)
    load_weights(block, weights)
    assert relative_error(run_first_block(model), expected) <= 1e-12


def test_scales_must_be_equal_over_the_heads_that_share_a_value() -> None:
    model = tiny_llama(value_heads=2)
    block, shape, site = first_block(model), value_heads(model.config), SITES["o"]
    expected, weights = run_first_block(model), weights_of(first_block(model))
    fold_into_producer(block, site, weights, scales_for(site), shape, torch.float64)
    load_weights(block, weights)
    assert relative_error(run_first_block(model), expected) > 0.1


def test_only_the_value_path_ties_scales_together() -> None:
    scales = scales_for(SITES["o"])
    assert not torch.equal(shareable_scales(scales, SITES["o"], (2, 16)), scales)
    for name in ("qkv", "gate_up", "down"):
        assert shareable_scales(scales, SITES[name], (2, 16)) is scales


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qkv", "gate_up"])
def test_the_weights_make_up_for_the_rounding_of_a_gain(name: str, dtype: torch.dtype) -> None:
    """The gain that a checkpoint keeps is a multiple of 2^-10 off; the product is exact all the same."""
    model = tiny_llama()
    block, shape, site = first_block(model), value_heads(model.config), SITES[name]
    expected, weights = run_first_block(model), weights_of(first_block(model))
    assert site.norm is not None
    gain = block.get_parameter(f"{site.norm}.weight")
    exact = gain / scales_for(site)

    fold_into_producer(block, site, weights, scales_for(site), shape, dtype)
    load_weights(block, weights)
    assert torch.equal(gain, exact.to(dtype).double()) and not torch.equal(gain, exact)
    assert relative_error(run_first_block(model), expected) <= 1e-12


def test_a_gain_of_zero_stays_zero() -> None:
    model = tiny_llama()
    block, shape, site = first_block(model), value_heads(model.config), SITES["qkv"]
    gain = block.get_parameter("input_layernorm.weight")
    gain[3] = 0
    expected, weights = run_first_block(model), weights_of(first_block(model))
    fold_into_producer(block, site, weights, scales_for(site), shape, torch.float16)
    load_weights(block, weights)
    assert gain[3] == 0 and all(weight.isfinite().all() for weight in weights.values())
    assert relative_error(run_first_block(model), expected) <= 1e-12


def test_a_bias_is_rounded_to_the_type_of_the_checkpoint() -> None:
    model = tiny_llama(biases=True)
    block, site, scales = first_block(model), SITES["down"], scales_for(SITES["down"])
    exact = block.get_parameter("mlp.up_proj.bias") / scales
    fold_into_producer(block, site, weights_of(block), scales, value_heads(model.config), torch.float16)
    got = block.get_parameter("mlp.up_proj.bias")
    assert torch.equal(got, exact.half().double()) and not torch.equal(got, exact)


def test_a_site_that_nothing_feeds_is_refused() -> None:
    site = replace(SITES["down"], producer=None)
    model = tiny_llama()
    message = r'^site down: nothing before it can take smoothing scales; use sharing = "block"'
    with pytest.raises(ConfigError, match=message):
        fold_into_producer(
            first_block(model), site, weights_of(first_block(model)), scales_for(site), (2, 16), torch.float64
        )
