"""The sites of a whole model, made ready for the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from mxrot.layers.linear import QuantLinear
from mxrot.layers.prepare import is_in_one_place, prepare_site


def prepare_linears(model: nn.Module, keeps_lifted: bool = False) -> None:
    """`prepare_site` for all sites of a model.

    A site whose weights are not all on one device (or on none, where they are offloaded) stays as it is.
    """
    for linears in sites_of(model):
        _prepare(linears, keeps_lifted)


def prepare_on_gpus(model: nn.Module, keeps_lifted: bool = False) -> None:
    """The same for the sites that are on a GPU, of a model that may be spread over devices."""
    for linears in sites_of(model):
        if linears[0].weight_packed.is_cuda:
            _prepare(linears, keeps_lifted)


def _prepare(linears: Sequence[QuantLinear], keeps_lifted: bool) -> None:
    if is_in_one_place(linears):
        prepare_site(linears, keeps_lifted)


def sites_of(model: nn.Module) -> Iterator[Sequence[QuantLinear]]:
    """The quantized linears of a model, those of a site together."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and (module.site is None or module.site.linears[0] is module):
            yield (module,) if module.site is None else module.site.linears
