"""How many tokens pass through a decoder block together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration.executor import HELD
from mxrot.errors import DataError
from mxrot.layers import score_heads
from mxrot.models import Family

BATCH_TOKENS = {"cpu": 2048, "cuda": 131072}
"""The most tokens that pass through a block at once. It is fixed, so that sums always run in the same order."""
BATCH_ELEMENTS = 1 << 28
"""A bound on tokens times the widest activation, so that a large model's temporaries stay near a gigabyte each."""


def windows_at_once(model: PreTrainedModel, family: Family, device: torch.device, seq_len: int) -> int:
    """The number of calibration windows that pass through a block together."""
    inner = [module for module in model.get_submodule(family.blocks).modules() if isinstance(module, nn.Linear)]
    widest = max(max(linear.in_features, linear.out_features) for linear in inner)
    return max(1, tokens_at_once(max(widest, score_heads(model) * seq_len), device.type) // seq_len)


def tokens_at_once(widest: int, device_type: str) -> int:
    """The number of tokens that pass through a block together, if it holds at most `widest` numbers per token at a
    time."""
    return min(BATCH_TOKENS.get(device_type, BATCH_TOKENS["cpu"]), BATCH_ELEMENTS // widest)


def held_out(windows: int, share: float, kind: str) -> Tensor:
    """The windows of one kind of text that are held out from fits: evenly spaced, away from the ends; bool [windows].

    DataError if there are too few.
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
    """The positions of windows by purpose, as an executor takes them. None if no windows are held out.

    The first `given` windows are text, the others were written by the model. A kind with one window holds none out.
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
