"""The inputs of a block's attention function: queries, keys and values after norms, RoPE and other steps of the family.

They are recorded at the function itself, the only place that all families share: q, k and v may come from one linear,
or pass norms of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from mxrot.calibration.executor import Executor
from mxrot.calibration.hooks import StopForwardError
from mxrot.calibration.statistics import Summed
from mxrot.kernels import second_moment

SeeHeads = Callable[[Tensor, Tensor, Tensor], None]
"""Receives queries [windows, heads, tokens, D], and keys and values [windows, KV heads, tokens, D]."""
NAME = "mxrot_watched_attention"
_SEE = "sees_attention_inputs"


def watched_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Pass the inputs to the watching callback, and end the forward pass."""
    getattr(module, _SEE)(query, key, value)
    raise StopForwardError


AttentionInterface.register(NAME, watched_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


@contextmanager
def watched_heads(attention: nn.Module, see: SeeHeads) -> Iterator[None]:
    """While open, `see` gets the inputs of the attention function of the module `attention`. The pass ends there."""
    before: Any = attention.config
    own = copy(before)
    own._attn_implementation = NAME
    attention.config = own
    setattr(attention, _SEE, see)
    try:
        yield
    finally:
        attention.config = before
        delattr(attention, _SEE)


class HeadMoments(Summed):
    """The mean of x^T x over tokens for each head: float64 [KV heads, D, D]; products of one batch as in
    `second_moment`."""

    def update(self, x: Tensor, kept: int) -> None:
        """Add one batch [windows, heads, tokens, D]. Heads that share one of the `kept` KV heads are counted
        together."""
        heads = x.unflatten(1, (kept, -1)).transpose(0, 1).reshape(kept, -1, x.shape[-1])
        self._add(torch.stack([second_moment(rows, rows) for rows in heads]), heads.shape[1])


def head_moments(executor: Executor, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The second moments of queries, keys and values of the current block, each float64 [KV heads, D, D].

    `attention` is the module that calls the attention function. Moments are means over tokens, for queries also over
    the heads that share a key, and over all processes of the executor's world.
    """
    moments = [HeadMoments() for _ in range(3)]

    def see(query: Tensor, key: Tensor, value: Tensor) -> None:
        for one, x in zip(moments, (query, key, value), strict=True):
            one.update(x, key.shape[1])

    with watched_heads(attention, see):
        for _ in executor.outputs(executor.fitted):
            pass
    queries, keys, values = (one.result(executor.world) for one in moments)
    return queries, keys, values
