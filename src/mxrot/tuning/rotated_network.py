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

ROOM = {"cuda": 16e9, "cpu": 4e9}
"""Bytes that a backward pass may keep. A number, and not what is free: what is computed at once decides about the last
bits."""
WEIGHT_BYTES = 8.0
"""That a pass keeps of each weight of a block: as it is read, and rotated. On a CPU, where what is read need not be
cast, it was measured as 6."""
CHANNEL_BYTES = 5.0
"""That it keeps of a token for each input and output of a linear; measured in float32."""


@dataclass(frozen=True)
class Pieces:
    """How much is computed at once."""

    windows: int
    recompute: bool
    """Is a block computed once more for its gradients?"""

    @staticmethod
    def within(room: float, batch: int, blocks: int, weights: float, window: float, states: float) -> Pieces:
        """Of batches of so many windows, where a pass keeps so many bytes of the weights of a block, of a window in a
        block, and of its states between two blocks."""
        if (weights + batch * window) * blocks <= room:
            return Pieces(batch, recompute=False)
        most = max(1, int((room - weights) / (window + states * blocks)))
        return Pieces(-(-batch // -(-batch // most)), recompute=True)

    @staticmethod
    def of(model: PreTrainedModel, family: Family, shape: tuple[int, int], dtype: torch.dtype) -> Pieces:
        """For batches of so many windows of so many tokens, on the device that `model` is on."""
        blocks = list(model.get_submodule(family.blocks).children())
        batch, length = shape
        weights = WEIGHT_BYTES * max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
        window = length * max(_token_bytes(model, family, index, length) for index in range(len(blocks)))
        states = float(dtype.itemsize * length * model.config.get_text_config().hidden_size)
        room = ROOM.get(model.device.type, ROOM["cpu"])
        return Pieces.within(room, batch, len(blocks), weights, window, states)


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
        batch: int,
        dtype: torch.dtype = torch.float32,
    ) -> RotatedNetwork:
        """With linears of its own for each expert, for `batch` of the token windows [W, T] at a time; `sites` are those
        of each block."""
        check_logits(model, windows)
        model.get_submodule(family.final_norm).to(dtype)
        modules = model.get_submodule(family.blocks).children()
        blocks = [
            RotatedBlock.of(block, family, index, model.config, own, dtype)
            for index, (block, own) in enumerate(zip(modules, sites, strict=True))
        ]
        arguments = [in_type(keywords, dtype) for keywords in block_arguments(model, family, windows[:1])]
        pieces = Pieces.of(model, family, (min(batch, len(windows)), windows.shape[1]), dtype)
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
        passed: Any = None
        for block, turn, arguments in zip(self.blocks, turns, self.arguments, strict=True):
            own = {} if self.family.passes_on is None else {self.family.passes_on.keyword: passed}
            keywords = arguments | own
            with lower_precision(self.device):
                if self.pieces.recompute:
                    hidden, passed = checkpoint(
                        block.forward,
                        hidden,
                        residual,
                        turn,
                        keywords,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                else:
                    hidden, passed = block.forward(hidden, residual, turn, keywords)
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


def _token_bytes(model: PreTrainedModel, family: Family, index: int, length: int) -> float:
    """About what a backward pass keeps of one token in one block: for each linear's input and output, and scores that
    attention writes out, with the probabilities that they become."""
    widths, block = 0.0, model.get_submodule(family.block_prefix(index))
    for site in family.sites_of(index):
        for linear in site.linears:
            shape = block.get_parameter(f"{linear}.weight").shape
            widths += sum(shape) * family.token_share(model.config.get_text_config(), linear)
    return CHANNEL_BYTES * widths + 8.0 * score_heads(model) * length
