"""The distance of a quantized model from its original, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.calibration import ONE, World
from mxrot.errors import ConfigError, NumericsError
from mxrot.evaluation.perplexity import LOGITS_AT_ONCE, Perplexity, states_of
from mxrot.evaluation.shares import of_all, own_batches
from mxrot.layers import check_logits, logits_of
from mxrot.progress import Progress, silent


@dataclass(frozen=True)
class Divergence:
    """The means over windows. Standard errors assume that the windows are samples of one source."""

    kl: float
    """KL(original || quantized) of the next token, in nats per token."""
    kl_error: float
    agreement: float
    """The share of positions where both models give the same token the largest probability."""
    agreement_error: float
    ppl: float
    """The perplexity of the quantized model."""
    original_ppl: float
    ppl_difference: float
    """The perplexity of the quantized model minus that of the original."""
    ppl_error: float
    """The standard error of that difference, of paired windows, to first order in the log-likelihoods."""
    windows: int
    tokens: int
    """The number of compared positions: all tokens of a window except the first."""

    @property
    def perplexity(self) -> Perplexity:
        """The perplexity of the quantized model, as a record."""
        seq_len = self.tokens // self.windows + 1
        return Perplexity(self.ppl, math.log(self.ppl), self.windows, self.tokens, seq_len)


@torch.no_grad()
def divergence(
    model: PreTrainedModel,
    original: PreTrainedModel,
    windows: Tensor,
    batch_windows: int = 1,
    progress: Progress = silent,
    world: World = ONE,
) -> Divergence:
    """Compare two models of one vocabulary on token windows [W, T], both on their device at once; the processes of a
    `world` share the batches.

    Computed in float32 from both models' logits. ConfigError if the vocabularies differ in size, NumericsError if
    something is not finite, FamilyError if `logits_of` does not know the logits of one.
    """
    sizes = [int(m.config.get_text_config().vocab_size) for m in (model, original)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"models with {sizes[0]} and {sizes[1]} tokens in their vocabularies cannot be compared")
    for each in (model, original):
        check_logits(each, windows)
    own = own_batches(windows, batch_windows, world)
    found = []
    scored, total = 0, sum(batch.numel() for batch in own)
    for batch in own:
        progress(scored, total, "tokens")
        found.append(_window_means(model, original, batch).double().cpu())
        scored += batch.numel()
    progress(scored, total, "tokens")
    return divergence_of_means(of_all(found, world), windows)


def divergence_of_means(means: Tensor, windows: Tensor) -> Divergence:
    """The record of the float64 means [4, W] that `means_of_states` gives for these windows. NumericsError if one is
    not finite."""
    kl, agreement, nll, original_nll = checked_means(means)
    ppl, original_ppl = (math.exp(float(part.mean())) for part in (nll, original_nll))
    return Divergence(
        kl=float(kl.mean()),
        kl_error=_standard_error(kl),
        agreement=float(agreement.mean()),
        agreement_error=_standard_error(agreement),
        ppl=ppl,
        original_ppl=original_ppl,
        ppl_difference=ppl - original_ppl,
        # A change of the mean changes exp(mean) by exp(mean) times as much.
        ppl_error=_standard_error(ppl * nll - original_ppl * original_nll),
        windows=len(windows),
        tokens=len(windows) * (windows.shape[1] - 1),
    )


def checked_means(means: Tensor) -> Tensor:
    """The means, unchanged. NumericsError if one is not finite."""
    if not torch.isfinite(means).all():
        raise NumericsError("the logits of one of the models hold NaN or Inf; nothing can be compared")
    return means


def _window_means(model: PreTrainedModel, original: PreTrainedModel, ids: Tensor) -> Tensor:
    """KL, agreement and both negative log-likelihoods of each window, float32 [4, W]."""
    ids = ids.to(next(model.parameters()).device)
    return means_of_states(model, states_of(model, ids), original, states_of(original, ids), ids)


def means_of_states(
    model: PreTrainedModel, hidden: Tensor, original: PreTrainedModel, expected: Tensor, ids: Tensor
) -> Tensor:
    """KL, agreement and both negative log-likelihoods [4, W], from the last hidden states [W, T, hidden] of both
    models.

    Only the heads of the models are called. Log-probabilities and sums are float32. The logits of LOGITS_AT_ONCE
    positions exist at the same time.
    """
    totals = torch.zeros(4, len(ids), device=hidden.device)
    positions = ids.shape[1] - 1
    step = max(1, LOGITS_AT_ONCE // len(ids))
    for start in range(0, positions, step):
        stop = min(start + step, positions)
        targets = ids[:, start + 1 : stop + 1, None]
        logs = logits_of(model, hidden[:, start:stop]).float().log_softmax(dim=-1)
        wanted = logits_of(original, expected[:, start:stop]).float().log_softmax(dim=-1)
        totals[0] += F.kl_div(logs, wanted, reduction="none", log_target=True).sum(dim=(1, 2))
        totals[1] += (logs.argmax(dim=-1) == wanted.argmax(dim=-1)).sum(dim=1)
        totals[2] -= logs.gather(2, targets).sum(dim=(1, 2))
        totals[3] -= wanted.gather(2, targets).sum(dim=(1, 2))
    return totals / positions


def _standard_error(values: Tensor) -> float:
    """The standard error of the mean. NaN for a single value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
