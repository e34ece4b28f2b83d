"""Checks for numbers that overflow their type while a site is quantized. Errors name the layer; no Inf passes silently.

Weights and inputs are checked when they are read. Here their results are checked: smoothing scales that go into a gain,
statistics in float32, factorizations of second moments, and the values of codes and scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mxrot.errors import NumericsError
from mxrot.formats import QTensor
from mxrot.models import Site
from mxrot.transforms import SiteTransform


def check_folded(block: nn.Module, name: str, site: Site, dtype: torch.dtype) -> None:
    """Raise NumericsError if tensors that took the smoothing scales of `site` no longer fit into `dtype`."""
    for module, parameter in (
        (site.norm, "weight"),
        (site.producer, "bias"),
        *((name, "weight") for name in site.routers),
    ):
        value = None if module is None else getattr(block.get_submodule(module), parameter)
        if value is not None and not torch.isfinite(value).all():
            raise NumericsError(
                f"{name}.{module}.{parameter}: with smoothing scales it is more than {str(dtype).partition('.')[2]} "
                f'holds; list {site.group} under smoothing.skip, or set transform.sharing = "block"'
            )


def check_statistics(seen: dict[str, Tensor], name: str) -> None:
    """Raise NumericsError if a statistic of finite inputs is not finite: second moments are sums of squares in
    float32."""
    for need, statistic in seen.items():
        if not torch.isfinite(statistic).all():
            raise NumericsError(
                f"{name}: its inputs are so large on the calibration text that their {need} overflow; "
                "check the model's weights"
            )


@contextmanager
def named_factorizations(name: str) -> Iterator[None]:
    """While open, a matrix that cannot be factorized or inverted raises NumericsError with `name`."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise NumericsError(
            f"{name}: the second moments of its weights and inputs cannot be factorized, they are too large or too "
            'uneven; check the model\'s weights, or set transform.method = "hadamard"'
        ) from error


def check_transform(transform: SiteTransform, name: str) -> None:
    """Raise NumericsError unless a transform and its inverse are finite."""
    if not all(stage.is_finite for stage in transform.stages):
        raise NumericsError(f"{name}: its transform or the inverse is not finite; check the model's weights")


def check_rounded(weight: QTensor, wanted: Tensor, name: str) -> None:
    """Raise NumericsError if `weight`, made from the finite `wanted`, has values beyond float32."""
    if not weight.is_finite:
        raise NumericsError(
            f"{name}: {weight.format.name} rounds its largest weight, {wanted.abs().max():.3g}, to more than float32 "
            "holds (3.4e+38); check the model's weights"
        )
