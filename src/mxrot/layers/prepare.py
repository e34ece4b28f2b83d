"""Make a quantized model ready for the kernels: what can be looked at once is not looked at in every call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mxrot.kernels import takes_block_scales
from mxrot.kernels.plain import lift_exponents, plain_lift_weights, swizzle_scales
from mxrot.layers.linear import QuantLinear


@torch.no_grad()
def prepare_site(linears: Sequence[QuantLinear], keeps_lifted: bool = False) -> None:
    """Put the MXFP4 weights of a site into one tensor, and look whether they can be lifted to FP8.

    With `keeps_lifted` they are, which takes a byte a weight more. The linears keep their parameters, as parts.
    """
    first = linears[0]
    first.forget()
    are_mxfp4 = all(linear.weights.is_mxfp4 for linear in linears)
    if first.transform is not None:
        first.transform.prepare(are_mxfp4)
    if not are_mxfp4:
        return
    codes, scales = first.weight_packed.data, first.weight_scale.data
    if len(linears) > 1:
        codes = first.whole_codes = torch.cat([linear.weight_packed.data for linear in linears])
        scales = first.whole_scales = torch.cat([linear.weight_scale.data for linear in linears])
        rows = [linear.out_features for linear in linears]
        for linear, own_codes, own_scales in zip(linears, codes.split(rows), scales.split(rows), strict=True):
            linear.weight_packed.data, linear.weight_scale.data = own_codes, own_scales
    if takes_block_scales(codes.device):
        first.swizzled = swizzle_scales(scales)
        return
    exponents, outside = lift_exponents(codes, scales, together=True)
    powers = torch.exp2(exponents[0].float())
    if int(outside):
        exponents, outside = lift_exponents(codes, scales)
        powers = torch.exp2(exponents.float())
    if int(outside):
        return
    first.row_exponents = exponents
    # As integers: a cast of the module would cast these too.
    first.lifted_scales = powers.view(torch.int32)
    if keeps_lifted:
        first.lifted = plain_lift_weights(codes, scales, exponents).view(torch.uint8)


def prepare_linears(model: nn.Module, keeps_lifted: bool = False, fast: bool = False) -> None:
    """`prepare_site` for all sites of a model; `fast` as of its linears."""
    for linears in sites_of(model):
        for linear in linears:
            linear.fast = fast
        prepare_site(linears, keeps_lifted)


def sites_of(model: nn.Module) -> Iterator[Sequence[QuantLinear]]:
    """The quantized linears of a model, those of a site together."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and (module.site is None or module.site.linears[0] is module):
            yield (module,) if module.site is None else module.site.linears
