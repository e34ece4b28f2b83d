"""Where a quantized model is furthest from the original, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.evaluation.perplexity import LOGITS_AT_ONCE, states_of
from mxrot.layers import check_logits, logits_of

PASSAGE = 48
"""Tokens of a passage at most."""


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of a window, and what two models expected in their places."""

    window: int
    start: int
    """Position in the window of its first token; at least 1."""
    ids: Tensor
    """int64 [L]."""
    kl: Tensor
    """KL(original || quantized) of what was expected in the place of each token, nats, float32 [L]."""
    original: Tensor
    """The original's most likely token for each place, int64 [L]."""
    quantized: Tensor
    """The quantized model's."""


@torch.no_grad()
def worst_passage(model: PreTrainedModel, original: PreTrainedModel, windows: Tensor, length: int = PASSAGE) -> Passage:
    """The passage of token windows [W, T] with the largest mean KL, of `length` tokens or of a whole window but its
    first; the first of several.

    One window at a time; log-probabilities are float32. ConfigError or FamilyError where logits are not known.
    """
    length = min(length, windows.shape[1] - 1)
    for each in (model, original):
        check_logits(each, windows)
    worst, mean = None, float("-inf")
    for number, ids in enumerate(windows.split(1)):
        kl, expected, found = _by_token(model, original, ids)
        means = kl.unfold(0, length, 1).mean(dim=1)
        at = int(means.argmax())
        if float(means[at]) > mean:
            mean, there = float(means[at]), slice(at, at + length)
            worst = Passage(number, at + 1, ids[0, 1:][there], kl[there], expected[there], found[there])
    assert worst is not None, "a window has at least two tokens"
    return worst


def _by_token(model: PreTrainedModel, original: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each token of ids [1, T] but the first: KL, and the most likely tokens of the original and of the model."""
    device = next(model.parameters()).device
    states, wanted = (states_of(each, ids.to(device)) for each in (model, original))
    parts = []
    for start in range(0, ids.shape[1] - 1, LOGITS_AT_ONCE):
        stop = min(start + LOGITS_AT_ONCE, ids.shape[1] - 1)
        logs = logits_of(model, states[:, start:stop]).float().log_softmax(dim=-1)[0]
        expected = logits_of(original, wanted[:, start:stop]).float().log_softmax(dim=-1)[0]
        kl = F.kl_div(logs, expected, reduction="none", log_target=True).sum(dim=1)
        parts.append((kl.cpu(), expected.argmax(dim=1).cpu(), logs.argmax(dim=1).cpu()))
    kl, tops, own = (torch.cat(each) for each in zip(*parts, strict=True))
    return kl, tops, own
