"""Linears whose result for a row does not depend on the other rows, to the last bit.

The order in which products are summed decides the last bits, and the fastest order depends on the number of rows. The
result of a request to a server that batches requests therefore depends on the batch. In this mode, the tiles and shapes
of quantizer and product do not depend on the rows, so there is one order of sums. This costs speed (`mxrot bench
kernels`, row "invariant").

The mode is turned on by MXROT_INVARIANT=1 in the environment, by `set_invariant_rows`, and by vLLM's
VLLM_BATCH_INVARIANT=1. It covers only quantized linears: norms, attention and the head are other code, and the stages
of a transform before the last one do not change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

VARIABLE = "MXROT_INVARIANT"
ROWS = {"cpu": 1, "cuda": 64}
"""Rows per step of the plain path, by device type. A CPU takes one row at a time, because a library may treat rows at
the edge of a tile differently. Matrix hardware has one order for all rows of a tile."""
_is_on = os.environ.get(VARIABLE, "0") not in ("", "0")


def has_invariant_rows() -> bool:
    """True if a row must not depend on other rows."""
    return _is_on


def set_invariant_rows(is_on: bool) -> None:
    """Set the mode for this process, from now on. CUDA graphs that were recorded before do not change."""
    global _is_on
    _is_on = is_on


@contextmanager
def invariant_rows(is_on: bool = True) -> Iterator[None]:
    """Set the mode while open, and restore it afterwards."""
    before = _is_on
    set_invariant_rows(is_on)
    try:
        yield
    finally:
        set_invariant_rows(before)


def in_fixed_rows(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """compute(x) for x [..., K]. If rows must not depend on each other, the input has the same shape in every call.

    `compute` then gets ROWS rows [ROWS, K] at a time, with zeros after the last ones, and must treat all rows alike.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not _is_on or not len(flat):
        return compute(x)
    size = ROWS.get(x.device.type, 1)
    parts = []
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        whole = torch.zeros(size, flat.shape[1], dtype=x.dtype, device=x.device)  # always aligned alike
        whole[: len(part)] = part
        parts.append(compute(whole)[: len(part)])
    return torch.cat(parts).view(*x.shape[:-1], -1)
