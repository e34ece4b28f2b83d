"""Put quantized linears in the place of a block's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mxrot.formats import QTensor
from mxrot.layers import InputTransform, QuantLinear, SiteProducts, TensorQuantizer
from mxrot.models import Site

NO_TYPES: Mapping[str, torch.dtype] = MappingProxyType({})


def scheme_name(block_index: int, site: Site) -> str:
    """The name of a site's transform scheme in a checkpoint; [a-z0-9_] only."""
    return f"layer{block_index}_{site.name}"


def install_site(
    block: nn.Module,
    scheme: str,
    site: Site,
    quantized: dict[str, QTensor],
    stored_transform: Tensor | None,
    weights: TensorQuantizer,
    activations: TensorQuantizer | None,
) -> None:
    """Replace the linears of `site` by quantized ones that share one input transform."""
    install_empty_site(block, scheme, site, stored_transform, weights, activations)
    for name in site.linears:
        linear = block.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        linear.set_weight(quantized[name])


def install_empty_site(
    block: nn.Module,
    scheme: str,
    site: Site,
    stored_transform: Tensor | None,
    weights: TensorQuantizer,
    activations: TensorQuantizer | None,
) -> None:
    """Like `install_site`, with zeros for codes and scales, to be filled from a file.

    The transform belongs to the first linear of the site. Those of one module are computed together: they get the
    very same input, and those of two experts do not.
    """
    transform = None if stored_transform is None else InputTransform(stored_transform)
    placed: dict[str, list[QuantLinear]] = defaultdict(list)
    for position, name in enumerate(site.linears):
        old = block.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = QuantLinear(old.in_features, old.out_features, weights, activations, old.bias, old.weight.device)
        if transform is not None and position == 0:
            new.own_transform(scheme, transform)
        elif transform is not None:
            new.share_transform(transform)
        block.set_submodule(name, new)
        placed[name.rpartition(".")[0]].append(new)
    for linears in placed.values():
        if len(linears) > 1:
            products = SiteProducts(linears)
            for linear in linears:
                linear.site = products


def stored_tensors(
    block: nn.Module, dtype: torch.dtype, own: Mapping[str, torch.dtype] = NO_TYPES
) -> dict[str, Tensor]:
    """The tensors of a block as a checkpoint keeps them: quantized ones as they are, all others in `dtype`, or in the
    type that `own` has for their name."""
    quantized = {
        f"{name}.{parameter}" if name else parameter
        for name, module in block.named_modules()
        if isinstance(module, (QuantLinear, InputTransform))
        for parameter, _ in module.named_parameters(recurse=False)
        if parameter != "bias"
    }
    return {
        name: (value if name in quantized else value.to(own.get(name, dtype))).detach()
        for name, value in block.state_dict().items()
    }
