"""Fold per-channel smoothing scales into the layers around a site.

A site reads x; it should read x / s instead, with linears W * s. With `sharing = "block"` the division is a diagonal
factor of the site's own transform, and nothing here is needed. With `sharing = "site"` it goes into whatever computes
x: the gain of an RMSNorm, or the rows (and bias) of up_proj or v_proj.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mxrot.errors import ConfigError
from mxrot.models import Site
from mxrot.transforms.smoothing import SmoothingBy, equal_over_groups, per_value_row

Weights = dict[str, Tensor]
"""The weights of the linears of one block, by their names in it: as they were read, float64 once they are changed."""


def shareable_scales(scales: Tensor, site: Site, heads: tuple[int, int], by: SmoothingBy = "maxima") -> Tensor:
    """The scales [K] that the producer of the site can take: equal over the query heads of a value head."""
    return equal_over_groups(scales, *heads, by) if site.producer_is_value else scales


def fold_into_producer(
    block: nn.Module,
    site: Site,
    weights: Weights,
    scales: Tensor,
    heads: tuple[int, int],
    dtype: torch.dtype,
    router_types: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Divide the producer of the site's input by `scales` (float64 [K]) and multiply the weights of its readers.

    `weights` gets new float64 entries, and `block` a new norm gain or bias. A norm gain is rounded once, to the
    checkpoint's `dtype`. The weights are multiplied by the actual ratio of old and rounded gain, so the product stays
    exact. So are those of routers, which are rounded again, to `router_types` by their names, or to `dtype`. The bias
    of a norm is divided by that ratio and rounded once, as is that of a producer. ConfigError for a site whose input
    has no such producer.
    """
    if site.norm is not None:
        scales = _divide_gain(block.get_submodule(site.norm), scales, dtype, 1.0 if site.norm_adds_one else 0.0)
    elif site.producer is not None:
        rows = _row_scales(site, scales, heads, len(weights[site.producer]))
        weights[site.producer] = weights[site.producer] / rows[:, None]
        bias = block.get_submodule(site.producer).bias
        if isinstance(bias, Tensor):
            bias.data.copy_((bias.double() / rows).to(dtype))
    else:
        raise ConfigError(f'site {site.name}: nothing before it can take smoothing scales; use sharing = "block"')
    for linear in site.linears:
        weights[linear] = weights[linear] * scales
    for name in site.routers:
        router = block.get_submodule(name).weight
        assert isinstance(router, Tensor)
        router.data.copy_((router.double() * scales).to((router_types or {}).get(name, dtype)))


def _row_scales(site: Site, scales: Tensor, heads: tuple[int, int], rows: int) -> Tensor:
    """The divisors of the producer's rows, [rows]; 1 for those of keys."""
    if not site.producer_is_value:
        return scales
    of_values = per_value_row(scales, *heads)
    if not site.keys_beside_values:
        return of_values
    of_keys = scales.new_ones(heads[0], rows // heads[0] - heads[1])
    return torch.cat([of_keys, of_values.view(heads)], dim=1).flatten()


def _divide_gain(norm: nn.Module, scales: Tensor, dtype: torch.dtype, added: float) -> Tensor:
    """Divide the gain of `norm`, `added` + its weight. Returns the scales after rounding."""
    assert isinstance(norm.weight, Tensor)
    gain = added + norm.weight.double()
    rounded = (gain / scales - added).to(dtype).double()
    if added:
        # Beside the added term, a small gain can be rounded to zero. Its channel would be lost.
        step = torch.finfo(dtype).eps * added * torch.where(gain < 0, -1.0, 0.5)
        rounded = torch.where((rounded == -added) & (gain != 0), step - added, rounded)
    divided = added + rounded
    applied = torch.where(divided != 0, gain / torch.where(divided != 0, divided, 1.0), scales)
    norm.weight.data.copy_(rounded)  # last: `gain` may be this same tensor in a float64 model
    bias = getattr(norm, "bias", None)
    if isinstance(bias, Tensor):
        bias.data.copy_((bias.double() / applied).to(dtype))
    return applied
