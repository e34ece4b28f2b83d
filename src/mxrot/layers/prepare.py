"""Prepare the linears of a site for the kernels: checks that can be made once are not made in every call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mxrot.kernels import takes_block_scales
from mxrot.kernels.plain import lift_exponents, plain_lift_weights, swizzle_scales
from mxrot.layers.site import SiteLinear, share_weights
from mxrot.layers.transform import keep


@torch.no_grad()
def prepare_site(linears: Sequence[SiteLinear], keeps_lifted: bool = False) -> None:
    """Put the MXFP4 weights of a site into one tensor, and check whether they can be lifted to FP8.

    With `keeps_lifted` they are lifted, which takes one byte more per weight. The parameters of the linears become
    views.
    """
    first = linears[0]
    first.forget()
    for linear in linears:
        linear.keeps_lifted = keeps_lifted
    are_mxfp4 = all(linear.weights.is_mxfp4 for linear in linears)
    if first.transform is not None:
        first.transform.prepare(are_mxfp4)
    if not are_mxfp4:
        return
    codes, scales = first.weight_packed.data, first.weight_scale.data
    if len(linears) > 1:
        codes = torch.cat([linear.weight_packed.data for linear in linears])
        scales = torch.cat([linear.weight_scale.data for linear in linears])
        keep(first, "whole_codes", codes)
        keep(first, "whole_scales", scales)
        share_weights(linears, codes, scales)
    if takes_block_scales(codes.device):
        keep(first, "swizzled", swizzle_scales(scales))
        return
    exponents, outside = lift_exponents(codes, scales, together=True)
    powers = torch.exp2(exponents[0].float())
    if int(outside):
        exponents, outside = lift_exponents(codes, scales)
        powers = torch.exp2(exponents.float())
    if int(outside):
        return
    keep(first, "row_exponents", exponents)
    # As integers: a cast of the module would change floats.
    keep(first, "lifted_scales", powers.view(torch.int32))
    if keeps_lifted:
        keep(first, "lifted", plain_lift_weights(codes, scales, exponents).view(torch.uint8))


def is_in_one_place(linears: Sequence[SiteLinear]) -> bool:
    """True if the weights and the transform of a site are on one device, and no hooks offload them."""
    stored = [linear.weight_packed for linear in linears]
    transforms = {linear.transform for linear in linears if linear.transform is not None}
    stored += [tensor for transform in transforms for tensor in transform.parameters()]
    devices = {tensor.device for tensor in stored}
    return len(devices) == 1 and torch.device("meta") not in devices
