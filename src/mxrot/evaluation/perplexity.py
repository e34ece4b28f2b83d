"""Perplexity of a causal language model on token windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.calibration import ONE, World
from mxrot.errors import NumericsError
from mxrot.evaluation.shares import of_all, own_batches
from mxrot.layers import PackedCache, check_logits, logits_of
from mxrot.layers.cache_size import cache_of
from mxrot.progress import Progress, silent

LOGITS_AT_ONCE = 1024
"""The number of positions, over all windows of a batch, whose logits exist at the same time.

With a vocabulary of 128k, the float32 logits of one position take half a megabyte.
"""


@dataclass(frozen=True)
class Perplexity:
    """The perplexity: exp of the mean over windows of the mean negative log-likelihood of a token."""

    ppl: float
    nll: float
    """The mean negative log-likelihood, in nats per token."""
    windows: int
    tokens: int
    """The number of scored tokens: all tokens of a window except the first."""
    seq_len: int


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    batch_windows: int = 1,
    progress: Progress = silent,
    piece: int | None = None,
    world: World = ONE,
) -> Perplexity:
    """The perplexity over token windows [W, T], each by itself, in batches of `batch_windows`.

    The processes of a `world` share the batches. All of them get the record that one process gets, bit for bit. If the
    model has a quantized cache, each window is read through it, `piece` tokens at a time, or as a whole if `piece` is
    None. Log-likelihoods are computed in float32 from the model's logits. NumericsError if they are not finite,
    FamilyError if `logits_of` does not know the logits of the family.
    """
    device = next(model.parameters()).device
    check_logits(model, windows)
    own = own_batches(windows, batch_windows, world)
    sums = []
    scored, total = 0, sum(batch.numel() for batch in own)
    for batch in own:
        progress(scored, total, "tokens")
        ids = batch.to(device)
        sums.append(nll_of_states(model, states_of(model, ids, piece), ids).double().cpu())
        scored += batch.numel()
    progress(scored, total, "tokens")
    return perplexity_of_means(of_all(sums, world), windows)


def perplexity_of_means(means: Tensor, windows: Tensor) -> Perplexity:
    """The record of these windows' mean negative log-likelihoods, float64 [W]; NumericsError if one is not finite."""
    nll = float(means.mean())
    if not math.isfinite(nll):
        raise NumericsError("the model's logits hold NaN or Inf; perplexity is not defined")
    return Perplexity(math.exp(nll), nll, len(windows), len(windows) * (windows.shape[1] - 1), windows.shape[1])


def states_of(model: PreTrainedModel, ids: Tensor, piece: int | None = None) -> Tensor:
    """The last hidden states [W, T, hidden] of token ids [W, T], the input of the head.

    A model with a quantized cache reads every key and value from a cache that is new for these windows. With `piece`,
    it reads this many tokens at once, with the same result up to the order of sums.
    """
    decoder = model.get_decoder()
    if cache_of(model) is None:
        states: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states
    cache = PackedCache.of(model)
    length = ids.shape[1]
    places = torch.arange(length, device=ids.device)[None]  # Bamba would count them from 0 in each piece
    parts = zip(*(x.split(piece or length, dim=1) for x in (ids, places)), strict=True)
    found = [decoder(input_ids=part, position_ids=own, past_key_values=cache, use_cache=True)[0] for part, own in parts]
    return torch.cat(found, dim=1)


def nll_of_states(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """The mean negative log-likelihood of each window, float32 [W]."""
    total = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    positions = ids.shape[1] - 1
    step = max(1, LOGITS_AT_ONCE // len(ids))
    for start in range(0, positions, step):
        stop = min(start + step, positions)
        logits = logits_of(model, hidden[:, start:stop]).float()
        targets = ids[:, start + 1 : stop + 1]
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).sum(1)
    return total / positions
