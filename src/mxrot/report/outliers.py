"""The channels and tokens of an input that stick out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mxrot.evaluation import ActivationView

CHANNELS = 5
TOKENS = 3
"""The number of tokens shown."""


class Outlier(NamedTuple):
    """A channel or a token."""

    number: int
    times: float
    """Its max |x| divided by the median of all."""


def outlier_channels(view: ActivationView, count: int = CHANNELS) -> list[Outlier]:
    """The channels, the largest first."""
    return _largest(view.channel_maxima, count)


def outlier_tokens(view: ActivationView, tokens: Sequence[str], count: int = TOKENS) -> list[Outlier]:
    """The tokens, the largest first. Empty if a site sees only some tokens, as with experts."""
    return _largest(view.token_maxima, count) if len(view.token_maxima) == len(tokens) else []


def _largest(maxima: Tensor, count: int) -> list[Outlier]:
    middle = float(maxima.median()) or 1.0
    found = maxima.topk(min(count, len(maxima)))
    return [
        Outlier(number, value / middle)
        for number, value in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
