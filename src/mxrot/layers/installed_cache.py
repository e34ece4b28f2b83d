"""The quantized cache of an attention module: its scheme, and the matrices that its keys and values are turned by.

Keys are kept as Q(k T) and values as Q(v U); a query is multiplied by T^-T and what a head gives by U^-1, so without Q
nothing changes (QuaRot, arXiv 2404.00456, section 4, for Hadamard matrices). k T and v U are products in float64,
rounded once: so the codes of a token do not depend on how many tokens come with it. The others are in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.formats import CacheScheme
from mxrot.kernels import CacheMatrices
from mxrot.transforms.orders import multiply_by_hadamard

INSTALLED = "quantized_cache"
"""The attribute of an attention module that says how its cache is quantized."""


def turned(x: Tensor, matrix: Tensor | None) -> Tensor:
    """x T of [B, heads, n, D] and a float64 matrix, or x without one: float32, or float64 for x in float64."""
    if matrix is None:
        return x
    return (x.double() @ matrix).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


@dataclass
class InstalledCache:
    """What `quantize_cache` leaves with a module."""

    scheme: CacheScheme
    before: Any
    """The config that the module had."""
    _made: tuple[Any, list[Tensor], CacheMatrices] | None = field(default=None, repr=False)
    """Matrices, by what they were made of; the stored ones are held, so that no other tensor comes to lie there."""

    def matrices(self, module: nn.Module, width: int, device: torch.device, work: torch.dtype) -> CacheMatrices:
        """Those of `module` on a device: T and U in float64, their inverses in `work`, float32 or float64. Kept until
        what is stored changes."""
        stored = [getattr(module, name).to(device) for name in self.scheme.stored_names]
        if any(one.is_inference() or (one.requires_grad and torch.is_grad_enabled()) for one in stored):
            return _made_of(self.scheme, dict(zip(self.scheme.stored_names, stored, strict=True)), width, device, work)
        key = (width, device, work, *((one.data_ptr(), one._version) for one in stored))
        if self._made is None or self._made[0] != key:
            named = {name: one.detach() for name, one in zip(self.scheme.stored_names, stored, strict=True)}
            self._made = key, list(named.values()), _made_of(self.scheme, named, width, device, work)
        return self._made[2]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_made": None}


def installed_cache(attention: nn.Module) -> InstalledCache | None:
    """What is installed in an attention module, if anything is."""
    found: InstalledCache | None = getattr(attention, INSTALLED, None)
    return found


def cache_scheme_of(attention: nn.Module) -> CacheScheme | None:
    """How an attention module quantizes its cache; None if it does not."""
    found = installed_cache(attention)
    return None if found is None else found.scheme


def _made_of(
    scheme: CacheScheme, stored: dict[str, Tensor], width: int, device: torch.device, work: torch.dtype
) -> CacheMatrices:
    keys = _matrix(scheme.key_transform, stored.get("key_transform"), width, device)
    values = _matrix(scheme.value_transform, stored.get("value_transform"), width, device)
    return CacheMatrices(
        keys,
        None if keys is None else torch.linalg.inv(keys).mT.to(work).contiguous(),
        values,
        None if values is None else torch.linalg.inv(values).to(work).contiguous(),
    )


def _matrix(kind: str, stored: Tensor | None, width: int, device: torch.device) -> Tensor | None:
    if kind == "hadamard":
        found: Tensor = multiply_by_hadamard(torch.eye(width, dtype=torch.float64), False)
        return found[None].to(device)
    return None if stored is None else stored.double()
