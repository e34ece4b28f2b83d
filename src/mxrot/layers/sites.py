"""Preparation of all sites of a model for the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mxrot.kernels.warm_up import warm_up
from mxrot.layers.head import HeadLinear
from mxrot.layers.linear import QuantLinear
from mxrot.layers.prepare import is_in_one_place, prepare_site


def prepare_linears(model: nn.Module, keeps_lifted: bool = False) -> None:
    """Call `prepare_site` for all sites of a model.

    A site is not prepared if its weights are not all on one device, or are offloaded.
    """
    for linears in sites_of(model):
        _prepare(linears, keeps_lifted)


def prepare_on_gpus(model: nn.Module, keeps_lifted: bool = False) -> None:
    """The same for the sites that are on a GPU. The model may be spread over devices."""
    for linears in sites_of(model):
        if linears[0].weight_packed.is_cuda:
            _prepare(linears, keeps_lifted)


@torch.no_grad()
def warm_up_linear(linear: QuantLinear, dtype: torch.dtype, most_rows: int) -> list[int]:
    """Compile the kernels that compute a prepared linear for inputs of up to `most_rows` rows in `dtype`. Returns the
    numbers of rows that it was called with; none on a device without compiled kernels."""
    weight = linear.site_weight()
    activations = linear.activations
    are_mxfp4 = activations is not None and linear.weights.is_mxfp4 and activations.is_mxfp4
    return warm_up(
        lambda x: linear.compute(x, weight, None),
        weight.packed() if are_mxfp4 else None,
        linear.transform.matrices() if linear.transform is not None and linear.transform.has_matrices else None,
        torch.empty(0, linear.in_features, dtype=dtype, device=weight.codes.device),
        most_rows,
    )


def _prepare(linears: Sequence[QuantLinear], keeps_lifted: bool) -> None:
    if is_in_one_place(linears):
        reads_codes = isinstance(linears[0], HeadLinear) and linears[0].activations is None
        prepare_site(linears, keeps_lifted and not reads_codes)


def sites_of(model: nn.Module) -> Iterator[Sequence[QuantLinear]]:
    """The quantized linears of a model, grouped by site."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and (module.site is None or module.site.linears[0] is module):
            yield (module,) if module.site is None else module.site.linears
