"""The quantization of sites while rotations are trained: by the rules of the recipe, with straight-through
gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from mxrot.calibration.site_weights import to_fit_to
from mxrot.formats import TensorQuantizer
from mxrot.kernels import rotate_quantize
from mxrot.models import Site
from mxrot.rules import Rules
from mxrot.transforms import SiteSample, SiteTransform, generator_for
from mxrot.tuning.straight_through import PassThrough

Rounds = Callable[[Tensor], Tensor]
"""A rounding function with a gradient."""


@dataclass(frozen=True)
class TrainedSite:
    """The quantization of a site while rotations are trained."""

    site: Site
    """The site with its quantized linears."""
    transform: SiteTransform | None = None
    """The transform of its inputs at run time, which is not trained."""
    inputs: Rounds | None = None
    """Rounds the transformed inputs; None leaves them unchanged."""
    weights: Rounds | None = None
    """Rounds the folded weights; None leaves them unchanged."""


def trained_sites(rules: Rules, index: int, block: nn.Module, seed: int) -> list[TrainedSite]:
    """The sites of a block with separate linears for each expert. Weights are rounded only if the recipe's rotation is
    trained on quantized ones.

    Transforms are those that quantizing will use: they need no data.
    """
    rotation = rules.recipe.rotation
    assert rotation is not None
    found = []
    for site in rules.active_sites(index):
        recipe = rules.of(index, site.name)
        inputs = None if recipe.activations is None else recipe.activations.for_inputs()
        weights = recipe.weights.quantizer() if rotation.quantized_weights else None
        found.append(
            TrainedSite(
                site,
                _transform(rules, index, site, block, seed),
                None if inputs is None else partial(rounded_inputs, inputs),
                None if weights is None else partial(rounded_weights, weights),
            )
        )
    return found


def _transform(rules: Rules, index: int, site: Site, block: nn.Module, seed: int) -> SiteTransform | None:
    recipe = rules.of(index, site.name)
    weights = {linear: block.get_parameter(f"{linear}.weight") for linear in site.linears}
    if not recipe.transform.specs(weights[site.linears[0]].shape[1], recipe.sharing, smoothed=False):
        return None
    sample = SiteSample(to_fit_to(weights, site.linears, None), recipe.transform.block)
    generator = generator_for(seed, f"{rules.family.block_prefix(index)}.{site.linears[0]}")
    method = recipe.transform.beside(recipe.rounding.mends_later_columns)
    return SiteTransform.of(method.fit(sample, recipe.sharing, generator)).as_applied()


def rounded_inputs(quantizer: TensorQuantizer, x: Tensor) -> Tensor:
    """Q(x) as in `rotate_quantize`; on a CPU, which has no autocast for linears, in the type of `x`."""

    def rounds(x: Tensor) -> Tensor:
        found = rotate_quantize(x, None, quantizer.format, quantizer.rule)
        return found.to(x.dtype) if x.device.type == "cpu" else found

    found: Tensor = PassThrough.apply(x, rounds)
    return found


def rounded_weights(quantizer: TensorQuantizer, weight: Tensor) -> Tensor:
    """Q(W) in the type of `weight`."""

    def rounds(weight: Tensor) -> Tensor:
        return quantizer(weight).to(weight.dtype)

    found: Tensor = PassThrough.apply(weight, rounds)
    return found
