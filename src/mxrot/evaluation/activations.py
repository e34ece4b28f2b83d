"""The inputs of each site as data for pictures: magnitudes over token and channel, and the maxima of blocks."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration import watched_inputs
from mxrot.formats import TensorQuantizer
from mxrot.layers import QuantLinear, separate_experts
from mxrot.models import Family
from mxrot.progress import Progress, silent
from mxrot.scheme import Scheme

TOKENS_SHOWN = 128
"""The number of tokens of a map: the first ones of the first window."""
COLUMNS_SHOWN = 320
"""The most columns of a map. Neighbouring channels share a column, which shows the largest of them."""
BLOCK = 32
PARTS_OF_OCTAVE = 4
FIRST_OCTAVE, LAST_OCTAVE = -24, 24


@dataclass(frozen=True)
class ActivationView:
    """The inputs of one site, over some tokens."""

    magnitudes: Tensor
    """max |x| over neighbouring channels, float32 [tokens, columns]."""
    channels: int
    block_maxima: Tensor
    """The number of blocks of 32 with max |x| in [2^(e/4), 2^((e+1)/4)), int64. The first bin is e = 4 FIRST_OCTAVE.
    Smaller and larger maxima count in the first and last bin, blocks of zeros do not count."""
    channel_maxima: Tensor
    """max |x| of each channel, float32 [K]."""
    token_maxima: Tensor
    """max |x| of each token of the site, in their order, float32 [tokens]."""
    largest: float
    """max |x|."""
    median: float
    """The median of the nonzero |x|, over the tokens of the map. 1 if all are zero."""
    crest: float
    """max |x| divided by the root mean square of its block, the mean over the nonzero blocks."""
    rounding_error: float | None
    """||Q(x) - x|| / ||x|| of a token's whole input, the mean over tokens. None if inputs are not quantized."""


class _Watcher:
    """Collects the view of one site from its inputs, batch by batch."""

    def __init__(self, change: nn.Module | None, quantizer: TensorQuantizer | None) -> None:
        self._change, self._quantizer = change, quantizer
        self._magnitudes: Tensor | None = None
        self._median = 1.0
        self._channels = 0
        self._block_maxima = torch.zeros((LAST_OCTAVE - FIRST_OCTAVE) * PARTS_OF_OCTAVE, dtype=torch.int64)
        self._largest, self._crests, self._blocks = 0.0, 0.0, 0
        self._errors, self._tokens = 0.0, 0
        self._channel_maxima: Tensor | None = None
        self._token_maxima: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Add inputs [windows, tokens, K], of one window, or [tokens, K]."""
        x = x.float() if self._change is None else self._change(x)
        self._channels = x.shape[-1]
        if self._magnitudes is None:
            shown = x.flatten(0, -2)[:TOKENS_SHOWN].abs()
            self._magnitudes = _pooled(shown).cpu()
            self._median = float(shown[shown > 0].median()) if bool(shown.any()) else 1.0
        rows = x.flatten(0, -2)
        blocks = rows.unflatten(-1, (-1, BLOCK))
        maxima = blocks.abs().amax(dim=-1)
        squares = blocks.square().mean(dim=-1)
        kept = squares > 0
        self._block_maxima += _octave_counts(maxima[kept])
        self._largest = max(self._largest, float(maxima.max()))
        self._token_maxima.append(maxima.amax(dim=-1).cpu())
        highest = rows.abs().amax(dim=0).cpu()
        self._channel_maxima = highest if self._channel_maxima is None else self._channel_maxima.maximum(highest)
        self._crests += float((maxima[kept] / squares[kept].sqrt()).double().sum())
        self._blocks += int(kept.sum())
        if self._quantizer is not None:
            norms = torch.linalg.vector_norm(rows, dim=-1)
            errors = torch.linalg.vector_norm(self._quantizer(rows) - rows, dim=-1)
            self._errors += float(torch.where(norms > 0, errors / norms, 0).double().sum())
        self._tokens += len(rows)

    @property
    def has_seen(self) -> bool:
        """True if the site has seen any inputs."""
        return self._magnitudes is not None

    def view(self) -> ActivationView:
        assert self._magnitudes is not None and self._channel_maxima is not None
        return ActivationView(
            self._magnitudes,
            self._channels,
            self._block_maxima,
            self._channel_maxima,
            torch.cat(self._token_maxima),
            self._largest,
            self._median,
            self._crests / self._blocks if self._blocks else math.nan,
            None if self._quantizer is None else self._errors / self._tokens,
        )


def _pooled(magnitudes: Tensor) -> Tensor:
    """Maxima of neighbouring columns of [tokens, K], so that at most COLUMNS_SHOWN columns remain."""
    width = -(-magnitudes.shape[-1] // COLUMNS_SHOWN)
    missing = -magnitudes.shape[-1] % width
    return nn.functional.pad(magnitudes, (0, missing)).unflatten(-1, (-1, width)).amax(dim=-1)


def _octave_counts(maxima: Tensor) -> Tensor:
    bins = (LAST_OCTAVE - FIRST_OCTAVE) * PARTS_OF_OCTAVE
    index = (PARTS_OF_OCTAVE * (maxima.double().log2() - FIRST_OCTAVE)).floor().clamp(0, bins - 1)
    return torch.bincount(index.to(torch.int64).cpu(), minlength=bins)


@torch.no_grad()
def activation_views(
    model: PreTrainedModel,
    family: Family,
    windows: Tensor,
    scheme: Scheme,
    *,
    transformed: bool = False,
    progress: Progress = silent,
) -> dict[str, ActivationView]:
    """The inputs of every site over token windows [W, T], one window at a time, by the full name of its first linear.

    With `transformed`, they are the inputs after the transform of the site, as the linear rounds them, otherwise those
    before it. Both are computed in float32. The rounding error is that of `scheme`. Experts of `model` get separate
    linears. Sites of experts without any token have no view.
    """
    separate_experts(model)
    device = next(model.parameters()).device
    watchers: dict[str, _Watcher] = {}
    with ExitStack() as hooks:
        for index, block in enumerate(model.get_submodule(family.blocks).children()):
            for site in scheme.active_sites(family, index):
                linear = block.get_submodule(site.linears[0])
                change = linear.transform if transformed and isinstance(linear, QuantLinear) else None
                name = f"{family.block_prefix(index)}.{site.linears[0]}"
                watchers[name] = _Watcher(change, scheme.linears[name].activations)
                hooks.enter_context(watched_inputs(block.get_submodule(site.reader), watchers[name].update))
        for number, window in enumerate(windows.split(1)):
            progress(number, len(windows), "windows")
            model.get_submodule(family.body)(input_ids=window.to(device), use_cache=False)
    return {name: watcher.view() for name, watcher in watchers.items() if watcher.has_seen}
