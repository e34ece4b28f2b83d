"""The data of the original that a comparison needs later: KL divergence with one model in memory.

Log-probabilities of a vocabulary take hundreds of megabytes per window. Instead, the original's last hidden states are
kept, [T, hidden] per window in its compute dtype. They take about a hundredth of that, and are exact: its own head
computes the same logits from them again, bit for bit. While a quantized model is measured, only the head of the
original is on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.checkpoint.files import write_tensors
from mxrot.evaluation.divergence import Divergence, checked_means, divergence_of_means, means_of_states
from mxrot.evaluation.perplexity import Perplexity, nll_of_states, perplexity_of_means, states_of
from mxrot.layers import check_logits
from mxrot.models import Source, build_skeleton
from mxrot.progress import Progress, silent
from mxrot.quantizing.loading import compute_dtype, load_outer

_STATES = "states"


class KeptOriginal:
    """The original's last hidden states on the first `count` windows of each text (None: on all), in a folder.

    A folder belongs to one model, one set of windows and one device. Callers that keep it longer must ensure this.
    """

    def __init__(self, source: Source, folder: Path, count: int | None = None) -> None:
        self._source, self._folder, self._count = source, folder, count

    def holds(self, name: str, windows: Tensor, batch_windows: int) -> bool:
        """True if all states of the text `name` are there."""
        seen = len(windows[: self._count])
        return all(self._path(name, start).exists() for start in range(0, seen, batch_windows))

    @torch.no_grad()
    def keep(
        self, model: PreTrainedModel, name: str, windows: Tensor, batch_windows: int = 1, progress: Progress = silent
    ) -> Perplexity:
        """The perplexity of the original on token windows [W, T] of the text `name`, as by `perplexity`. Its states are
        written to the folder, one file per batch. DiskFullError if they do not fit."""
        self._folder.mkdir(parents=True, exist_ok=True)
        check_logits(model, windows)
        device, seen = next(model.parameters()).device, len(windows[: self._count])
        means = []
        for start in range(0, len(windows), batch_windows):
            progress(start * windows.shape[1], windows.numel(), "tokens")
            ids = windows[start : start + batch_windows].to(device)
            hidden = states_of(model, ids)
            means.append(nll_of_states(model, hidden, ids).double().cpu())
            if start < seen:
                write_tensors(self._path(name, start), {_STATES: hidden[: seen - start]})
        progress(windows.numel(), windows.numel(), "tokens")
        return perplexity_of_means(torch.cat(means), windows)

    def head(self, device: torch.device | str) -> PreTrainedModel:
        """The original's head, as a model for `logits_of`. Its decoder blocks are on the meta device."""
        model, family = build_skeleton(self._source.config), self._source.family
        device = torch.device(device)
        load_outer(model, family, self._source.outer(), compute_dtype(self._source.dtype, device), device)
        if not model.config.tie_word_embeddings:
            model.get_submodule(family.embedding).to("meta")
        return model

    def measure(
        self,
        model: PreTrainedModel,
        head: PreTrainedModel,
        name: str,
        windows: Tensor,
        batch_windows: int = 1,
        progress: Progress = silent,
    ) -> tuple[Perplexity, Divergence]:
        """The perplexity of a model on token windows [W, T] of the text `name`, and its divergence from the original on
        the windows with kept states. `head` is the original's.

        The figures are those of `perplexity` and `divergence`. NumericsError if one is not finite.
        """
        found = list(self._batches(model, head, name, windows, batch_windows, progress))
        both = torch.cat([means for means, _ in found], dim=1)
        nll = torch.cat([part for means, others in found for part in (means[2], others)])
        return perplexity_of_means(nll, windows), divergence_of_means(both, windows[: both.shape[1]])

    def means(
        self,
        model: PreTrainedModel,
        head: PreTrainedModel,
        name: str,
        windows: Tensor,
        batch_windows: int = 1,
        progress: Progress = silent,
    ) -> Tensor:
        """The result of `means_of_states` for each single window with kept states, float64 [4, W].

        Two models that were measured on the same windows can be compared window by window. NumericsError if a figure is
        not finite.
        """
        kept = windows[: self._count]
        found = [means for means, _ in self._batches(model, head, name, kept, batch_windows, progress)]
        return checked_means(torch.cat(found, dim=1))

    @torch.no_grad()
    def _batches(
        self,
        model: PreTrainedModel,
        head: PreTrainedModel,
        name: str,
        windows: Tensor,
        batch_windows: int,
        progress: Progress,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch, the means [4, W] of the windows with kept states, and the mean negative log-likelihoods [W]
        of the others, float64."""
        check_logits(model, windows)
        device, seen = next(model.parameters()).device, len(windows[: self._count])
        for start in range(0, len(windows), batch_windows):
            progress(start * windows.shape[1], windows.numel(), "tokens")
            ids = windows[start : start + batch_windows].to(device)
            hidden = states_of(model, ids)
            expected = load_file(self._path(name, start), device=str(device))[_STATES] if start < seen else hidden[:0]
            few = len(expected)
            means, others = torch.empty(4, 0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
            if few:
                means = means_of_states(model, hidden[:few], head, expected, ids[:few]).double().cpu()
            if few < len(ids):
                others = nll_of_states(model, hidden[few:], ids[few:]).double().cpu()
            yield means, others
        progress(windows.numel(), windows.numel(), "tokens")

    def _path(self, name: str, start: int) -> Path:
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
        return self._folder / f"{digest}-{start}.safetensors"
