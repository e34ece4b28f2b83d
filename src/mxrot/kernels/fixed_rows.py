"""Linears whose result for a row does not depend on the rows beside it, to the bit.

The order in which products are summed decides the last bits, and the fastest order depends on how many rows there are:
so does what a request gets from a server that puts requests together. Where this is on, quantizer and product have
tiles and shapes that do not depend on the rows, and so one order. It costs speed (`mxrot bench kernels`, row
"invariant").

On by MXROT_INVARIANT=1 in the environment, by `set_invariant_rows`, and under vLLM's VLLM_BATCH_INVARIANT=1. Only
quantized linears are meant: norms, attention and the head are of others, and the stages of a transform before its last
are as they were.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

VARIABLE = "MXROT_INVARIANT"
ROWS = {"cpu": 1, "cuda": 64}
"""Rows that the plain way takes at a time, by kind of device: on a CPU each by itself, because a library may treat the
rows at the edge of a tile otherwise. Matrix hardware has one order for all rows of a tile."""
_is_on = os.environ.get(VARIABLE, "0") not in ("", "0")


def has_invariant_rows() -> bool:
    """Must a row not depend on those beside it?"""
    return _is_on


def set_invariant_rows(is_on: bool) -> None:
    """For this process, from now on. CUDA graphs that were recorded before stay as they are."""
    global _is_on
    _is_on = is_on


@contextmanager
def invariant_rows(is_on: bool = True) -> Iterator[None]:
    """While open, and as it was afterwards."""
    before = _is_on
    set_invariant_rows(is_on)
    try:
        yield
    finally:
        set_invariant_rows(before)


def in_fixed_rows(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """compute(x) for x [..., K], where rows may depend on each other; else the same shape of input in every call.

    Then `compute` gets ROWS rows [ROWS, K] at a time, with zeros behind the last ones, and must treat rows alike.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not _is_on or not len(flat):
        return compute(x)
    size = ROWS.get(x.device.type, 1)
    parts = []
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        whole = torch.zeros(size, flat.shape[1], dtype=x.dtype, device=x.device)  # in memory of its own, aligned alike
        whole[: len(part)] = part
        parts.append(compute(whole)[: len(part)])
    return torch.cat(parts).view(*x.shape[:-1], -1)
