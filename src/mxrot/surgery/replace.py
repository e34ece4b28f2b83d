"""Replace the linears of a block by quantized ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mxrot.formats import TensorQuantizer
from mxrot.layers import InputTransform, QuantLinear, SiteProducts, cache_scheme_of
from mxrot.models import Site

NO_TYPES: Mapping[str, torch.dtype] = MappingProxyType({})


def install_empty_site(
    block: nn.Module,
    scheme: str,
    site: Site,
    transform: InputTransform | None,
    weights: TensorQuantizer,
    activations: TensorQuantizer | None,
) -> None:
    """Replace the linears of `site` by empty quantized ones that share one input transform, called by the name of a
    scheme. Codes and scales are zeros, to be filled.

    The transform belongs to the first linear of the site. Linears of one module are computed together, because they get
    the same input. Those of two experts are not.
    """
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
    """The tensors of a block for a checkpoint: quantized tensors and the matrices of a quantized cache unchanged, all
    others in `dtype`, or in the type that `own` has for their name."""
    quantized = {
        f"{name}.{parameter}" if name else parameter
        for name, module in block.named_modules()
        if isinstance(module, (QuantLinear, InputTransform))
        for parameter, _ in module.named_parameters(recurse=False)
        if parameter != "bias"
    }
    for name, module in block.named_modules():
        if (cache := cache_scheme_of(module)) is not None:
            quantized |= {f"{name}.{matrix}" for matrix in cache.stored_names}
    return {
        name: (value if name in quantized else value.to(own.get(name, dtype))).detach()
        for name, value in block.state_dict().items()
    }
