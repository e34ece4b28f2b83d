"""The network that rotations are trained in: the original model, its decoder blocks in the rotated basis and quantized.

Only the blocks are rotated. The states that the embedding gives are multiplied by R, what the last block gives by R^T,
and final norm and head stay as they are, which is the same function as with both merged: neither is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mxrot.calibration import block_arguments, first_hidden
from mxrot.layers import check_logits, fused_norms, logits_of, score_heads, shared_heads
from mxrot.models import Family
from mxrot.tuning.loop import deterministic
from mxrot.tuning.network import LOGIT_TOKENS, lower_precision
from mxrot.tuning.reconstruction import in_type
from mxrot.tuning.rotated_block import RotatedBlock
from mxrot.tuning.trained_sites import TrainedSite

DEVICE_SHARE = 1 / 3
"""Of the memory of a GPU that a backward pass may keep; so much, and no more than is free, because what is computed at
once decides about the last bits."""
HOST_BYTES = 4e9
"""The same on a CPU."""


@dataclass(frozen=True)
class Pieces:
    """How much is computed at once."""

    windows: int
    recompute: bool
    """Is a block computed once more for its gradients?"""

    @staticmethod
    def of(model: PreTrainedModel, family: Family, length: int, dtype: torch.dtype) -> Pieces:
        """For windows of so many tokens, on the device that `model` is on."""
        blocks = list(model.get_submodule(family.blocks).children())
        weights = sum(parameter.numel() for parameter in blocks[0].parameters()) * 3.0 * dtype.itemsize
        window = length * _token_bytes(model, family, blocks[0], length)
        states = length * model.config.hidden_size * 4.0
        device = next(blocks[0].parameters()).device
        room = HOST_BYTES
        if device.type == "cuda":
            room = DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory
        if (weights + window) * len(blocks) <= room:
            return Pieces(max(1, int((room / len(blocks) - weights) / window)), recompute=False)
        return Pieces(max(1, int((room - weights) / (window + states * len(blocks)))), recompute=True)


@dataclass(frozen=True)
class RotatedNetwork:
    """A model whose blocks are rotated, on its device."""

    model: PreTrainedModel
    family: Family
    blocks: Sequence[RotatedBlock]
    arguments: Sequence[dict[str, Any]]
    """The keyword arguments of each block."""
    pieces: Pieces
    dtype: torch.dtype = torch.float32
    """Of the residual stream, and of what weights are rotated in."""

    @staticmethod
    def of(
        model: PreTrainedModel,
        family: Family,
        windows: Tensor,
        sites: Sequence[Sequence[TrainedSite]],
        dtype: torch.dtype = torch.float32,
    ) -> RotatedNetwork:
        """With linears of its own for each expert, for token windows [W, T]; `sites` are those of each block."""
        check_logits(model, windows)
        model.get_submodule(family.final_norm).to(dtype)
        modules = model.get_submodule(family.blocks).children()
        blocks = [
            RotatedBlock.of(block, family, model.config, own, dtype) for block, own in zip(modules, sites, strict=True)
        ]
        arguments = [in_type(keywords, dtype) for keywords in block_arguments(model, family, windows[:1])]
        pieces = Pieces.of(model, family, windows.shape[1], dtype)
        return RotatedNetwork(model, family, blocks, arguments, pieces, dtype)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, inputs are quantized, and operations are deterministic."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(block.quantized_inputs())
            for context in (deterministic(), torch.enable_grad(), shared_heads(self.model), fused_norms(self.model)):
                stack.enter_context(context)
            yield

    def states(self, windows: Tensor, residual: Tensor | None, value_heads: Tensor | None) -> Tensor:
        """What the head reads [W, T, H], for token windows [W, T]; rotations [H, H], and [blocks, D, D]."""
        hidden = first_hidden(self.model, self.family, windows).to(self.dtype)
        residual = None if residual is None else residual.to(self.dtype)
        turns = [None] * len(self.blocks) if value_heads is None else value_heads.to(self.dtype).unbind()
        if residual is not None:
            hidden = hidden @ residual
        for block, turn, keywords in zip(self.blocks, turns, self.arguments, strict=True):
            with lower_precision(self.device):
                if self.pieces.recompute:
                    hidden = checkpoint(
                        block.forward,
                        hidden,
                        residual,
                        turn,
                        keywords,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                else:
                    hidden = block.forward(hidden, residual, turn, keywords)
        if residual is not None:
            hidden = hidden @ residual.mT
        normed: Tensor = self.model.get_submodule(self.family.final_norm)(hidden)
        return normed

    def loss(self, windows: Tensor, residual: Tensor | None, value_heads: Tensor | None, learns: bool = True) -> float:
        """Mean cross entropy of the next token, in nats, over token windows [W, T]; adds its gradients to those of the
        rotations where it `learns`."""
        count = windows.shape[0] * (windows.shape[1] - 1)
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for piece in windows.to(self.device).split(self.pieces.windows):
            with torch.set_grad_enabled(learns):
                states = self.states(piece, residual, value_heads)[:, :-1].flatten(0, 1)
                leaf = states.detach().requires_grad_(learns)
                following = piece[:, 1:].flatten()
                for part, targets in zip(leaf.split(LOGIT_TOKENS), following.split(LOGIT_TOKENS), strict=True):
                    with lower_precision(self.device):
                        logits = logits_of(self.model, part)
                    loss = nn.functional.cross_entropy(logits.to(self.dtype), targets, reduction="sum") / count
                    if learns:
                        loss.backward()
                    total += loss.detach()
                if learns:
                    states.backward(leaf.grad)
        return float(total)


def _token_bytes(model: PreTrainedModel, family: Family, block: nn.Module, length: int) -> float:
    """About what a backward pass keeps of one token in one block: each linear's input and output, twice for what lies
    between them; scores that attention writes out, and the probabilities that they become."""
    share = 1.0
    if family.experts is not None:
        share = model.config.num_experts_per_tok / getattr(model.config, family.experts.count)
    widths = 0.0
    for site in family.sites:
        shapes = [block.get_parameter(f"{linear}.weight").shape for linear in site.linears]
        widths += sum(map(sum, shapes)) * (share if site.is_of_experts else 1.0)
    return 8.0 * (widths + score_heads(model) * length)
