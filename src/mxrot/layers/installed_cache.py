"""The quantized cache of an attention module: its scheme, and the matrices for its keys and values.

Keys are kept as Q(k T) and values as Q(v U). A query is multiplied by T^-T and a head's output by U^-1, so without Q
nothing changes (QuaRot, arXiv 2404.00456, section 4, for Hadamard matrices). The products k T and v U are in float64,
rounded once. The codes of a token therefore do not depend on the number of tokens in a call. The other products are in
float32.
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
"""The attribute of an attention module that holds its quantized cache."""


def turned(x: Tensor, matrix: Tensor | None) -> Tensor:
    """x T of [B, heads, n, D] and a float64 matrix, or x without a matrix. The result is float32, or float64 for x in
    float64."""
    if matrix is None:
        return x
    return (x.double() @ matrix).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


@dataclass
class InstalledCache:
    """The state that `quantize_cache` stores in a module."""

    scheme: CacheScheme
    before: Any
    """The config that the module had before."""
    _made: tuple[Any, list[Tensor], CacheMatrices] | None = field(default=None, repr=False)
    """Matrices, with the tensors that they were made of. Holding the stored tensors keeps their memory from being
    reused."""

    def matrices(self, module: nn.Module, width: int, device: torch.device, work: torch.dtype) -> CacheMatrices:
        """The matrices of `module` on a device: T and U in float64, their inverses in `work`, float32 or float64. They
        are cached until the stored tensors change."""
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
    """The installed cache of an attention module. None without one."""
    found: InstalledCache | None = getattr(attention, INSTALLED, None)
    return found


def cache_scheme_of(attention: nn.Module) -> CacheScheme | None:
    """The scheme of an attention module's cache. None if the cache is not quantized."""
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
