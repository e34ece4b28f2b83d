"""The settings that choose between computations with different rounding."""

from __future__ import annotations

from typing import Any

import torch

from mxrot.kernels.crossovers import entry_of, find_crossovers
from mxrot.kernels.dispatch import has_triton
from mxrot.kernels.fixed_rows import has_invariant_rows


def kernel_choices(device: torch.device | str) -> dict[str, Any]:
    """The settings on this device that choose between computations with different rounding.

    The number of threads is not one of them (docs/log.md). Crossovers are numbers of rows up to which a path is the
    fastest. `invariant_rows` is set if rows must not depend on each other.
    """
    device = torch.device(device)
    precision: dict[str, Any] = {"float32_products": torch.get_float32_matmul_precision()}
    precision |= {"invariant_rows": True} if has_invariant_rows() else {}
    if device.type != "cuda":
        return precision | {"instructions": torch.backends.cpu.get_cpu_capability()}
    found = find_crossovers(device)
    crossovers = None if found is None else entry_of(found.crossovers) | {"from": found.origin}
    return precision | {"triton": has_triton(), "crossovers": crossovers}
