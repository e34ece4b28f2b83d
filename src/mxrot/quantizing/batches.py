"""How much passes through a decoder block together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration.executor import HELD
from mxrot.errors import DataError
from mxrot.layers import score_heads
from mxrot.models import Family

BATCH_TOKENS = {"cpu": 2048, "cuda": 131072}
"""Tokens that pass through a block at once, at most; fixed, so that sums always run in the same order."""
BATCH_ELEMENTS = 1 << 28
"""Bounds tokens times the widest activation, so that a large model's temporaries stay near a gigabyte each."""


def windows_at_once(model: PreTrainedModel, family: Family, device: torch.device, seq_len: int) -> int:
    """How many calibration windows pass through a block together."""
    inner = [module for module in model.get_submodule(family.blocks).modules() if isinstance(module, nn.Linear)]
    widest = max(max(linear.in_features, linear.out_features) for linear in inner)
    return max(1, tokens_at_once(max(widest, score_heads(model) * seq_len), device.type) // seq_len)


def tokens_at_once(widest: int, device_type: str) -> int:
    """The same in tokens, where a block makes so many numbers of a token at most, before it goes on."""
    return min(BATCH_TOKENS.get(device_type, BATCH_TOKENS["cpu"]), BATCH_ELEMENTS // widest)


def held_out(windows: int, share: float, kind: str) -> Tensor:
    """Which windows of a kind of text nothing is fitted to: evenly spaced, away from the ends; bool [windows].

    DataError where there are too few.
    """
    if windows < 2:
        raise DataError(
            f"calibration holds out windows: of the kind {kind!r} it needs 2, and has {windows}; give more text"
        )
    count = min(max(1, round(share * windows)), windows - 1)
    found = torch.zeros(windows, dtype=torch.bool)
    found[(2 * torch.arange(count) + 1) * windows // (2 * count)] = True
    return found


def window_groups(windows: int, given: int, share: float) -> dict[str, Tensor] | None:
    """Positions of windows by what they are for, as an executor takes them; None where none are held out.

    The first `given` are text, the others the model has written. Of a kind of one window nothing is held out.
    """
    if not share:
        return None
    found: dict[str, Tensor] = {}
    places = torch.arange(windows)
    for kind, own in (("text", places[:given]), ("written", places[given:])):
        if len(own):
            held = held_out(len(own), share, kind) if len(own) > 1 else torch.zeros(1, dtype=torch.bool)
            found |= {kind: own[~held]} | ({f"{HELD} {kind}": own[held]} if len(own) > 1 else {})
    return found
