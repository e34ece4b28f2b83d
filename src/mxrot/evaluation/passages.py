"""The passages where a quantized model differs most from the original, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.evaluation.perplexity import LOGITS_AT_ONCE, states_of
from mxrot.layers import check_logits, logits_of

PASSAGE = 48
"""The most tokens of a passage."""


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of a window, and the predictions of two models for their positions."""

    window: int
    start: int
    """The position of its first token in the window, at least 1."""
    ids: Tensor
    """int64 [L]."""
    kl: Tensor
    """KL(original || quantized) of the prediction of each token, in nats, float32 [L]."""
    original: Tensor
    """The original's most likely token at each position, int64 [L]."""
    quantized: Tensor
    """The quantized model's, int64 [L]."""


@torch.no_grad()
def worst_passage(model: PreTrainedModel, original: PreTrainedModel, windows: Tensor, length: int = PASSAGE) -> Passage:
    """The passage of token windows [W, T] with the largest mean KL, the first of equal ones. It has `length` tokens, or
    a whole window without its first token.

    One window at a time. Log-probabilities are float32. ConfigError or FamilyError if the logits are not known.
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
    """For each token of ids [1, T] except the first: KL, and the most likely tokens of original and model."""
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
