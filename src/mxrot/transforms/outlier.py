"""The outlier-aware rotation of DuQuant++ (arXiv 2604.17789, section 3; DuQuant, arXiv 2406.01721, section 3.2).

One step finds the channel c where |x| peaks, and rotates with R = E_c R~ diag(1, Q) E_c. E_c swaps channels 0 and c,
row 0 of R~ is uniformly 1/sqrt(B), and Q is a random orthogonal matrix of the other channels. The pivot keeps 1/sqrt(B)
of the peak; Q then turns the shares of the others, so that they are not even (docs/log.md). After n steps the prefix of
the product with the smallest peak is kept, which may be the empty one. One rotation is enough for MX formats: each
block has its own scale, so the variance between blocks, for which DuQuant needed a permutation and a second rotation,
does not matter.

The search never leaves the device: all blocks take a step at once, and the best prefix is found after the last step. By
default it looks only at the tokens with the largest peaks, because no other can hold the peak before the first step.
`sample = "spaced"` takes evenly spaced tokens, and "both" takes both.

`score = "error"` instead keeps the prefix with the least squared error of the run-time quantizer on the same tokens.
Ours: `score = "joint"` estimates the error of the block's output when both operands are rounded,

    mean over tokens of |(Q(x) - x) W^T|^2 + mean over tokens of |x (Q(W) - W)^T|^2

with the second factors represented by their second moments. `start = "moments"` begins with the transform of
mxrot.transforms.moments instead of the identity, and searches the rotations that may follow it.
The remaining options exist for `duquant++-released`: the code released with the paper picks the channel by the row
index modulo B, scores by max - min, draws Q once, and searches on the mean of the calibration windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.transforms.base import (
    BlockFormat,
    FitSize,
    SiteSample,
    TransformMethod,
    Work,
    random_orthogonal,
)
from mxrot.transforms.moments import SecondMoment
from mxrot.transforms.orders import hadamard_matrix
from mxrot.transforms.stages import BlockDiagonal, Sharing

GROUPS_AT_ONCE = 128
"""The blocks of 32 that are searched together. It bounds the memory of their rotations."""


def groups_at_once(block: int) -> int:
    """The number of blocks of this size that are searched together."""
    return max(1, min(GROUPS_AT_ONCE, GROUPS_AT_ONCE * 32**2 // block**2))


@cache
def spreading_rotation(size: int) -> Tensor:
    """R~, float64 [size, size]: orthogonal, with its first row uniformly 1/sqrt(size).

    It is the product G_(size-2) ... G_0 of Givens rotations in the planes (i, i + 1), cos = 1/sqrt(i + 2), sin =
    sqrt(i + 1)/sqrt(i + 2), with rows and columns 0 and size - 1 swapped at the end.
    """
    product = torch.eye(size, dtype=torch.float64)
    for i in range(size - 1):
        cos, sin = 1 / math.sqrt(i + 2), math.sqrt(i + 1) / math.sqrt(i + 2)
        givens = torch.eye(size, dtype=torch.float64)
        givens[i, i], givens[i, i + 1], givens[i + 1, i], givens[i + 1, i + 1] = cos, -sin, sin, cos
        product = givens @ product
    swap = torch.arange(size)
    swap[0], swap[-1] = size - 1, 0
    return product[swap][:, swap]


@dataclass(frozen=True)
class Operands:
    """The tensors that the search rotates, for a batch of blocks."""

    x: Tensor
    """Inputs, float32 [batch, rows, B]."""
    weights: Tensor | None = None
    """Rows of the weights, float32 [batch, rows, B]; None if the score does not use them."""
    moments: Tensor | None = None
    """The mean of x^T x over all tokens, [batch, B, B]."""

    def split(self, size: int) -> list[Operands]:
        """Split into batches of at most `size` blocks."""
        if self.weights is None or self.moments is None:
            return [Operands(x) for x in self.x.split(size)]
        parts = zip(self.x.split(size), self.weights.split(size), self.moments.split(size), strict=True)
        return [Operands(x, weights, moments.to(x.dtype)) for x, weights, moments in parts]

    def tensors(self) -> list[Tensor]:
        """The tensors that are present, in the order of the fields."""
        return [tensor for tensor in (self.x, self.weights, self.moments) if tensor is not None]

    def rotated(self, rotation: Tensor) -> Operands:
        """The operands after the rotation [batch, B, B], which acts on weights as on inputs."""
        x = self.x @ rotation
        if self.weights is None or self.moments is None:
            return Operands(x)
        return Operands(x, self.weights @ rotation, rotation.mT @ self.moments @ rotation)

    def output_error(self, lost: Tensor, quantize_weight: Callable[[Tensor], Tensor]) -> Tensor:
        """The estimated mean squared error of the outputs, [batch], if the inputs lose `lost`."""
        assert self.weights is not None and self.moments is not None
        lost_weights = quantize_weight(self.weights) - self.weights
        weight_moments = self.weights.mT @ self.weights / self.weights.shape[1]
        of_inputs = ((lost @ weight_moments) * lost).sum(dim=-1).mean(dim=-1)
        return of_inputs + ((lost_weights @ self.moments) * lost_weights).sum(dim=-1).mean(dim=-1)


@dataclass(frozen=True)
class OutlierRotation(TransformMethod):
    """Spreads the peaks by greedy rotations."""

    name = "outlier"

    steps: int = 64
    """The steps of the search (the paper: 128 or 256)."""
    score: Literal["peak", "error", "joint"] = "peak"
    """What the kept prefix minimizes: the peak, the squared error of the activation quantizer, or the estimated output
    error of both quantizers."""
    peak: Literal["abs", "range"] = "abs"
    """max |x| (DuQuant), or max x - min x (released code)."""
    pivot: Literal["channel", "row"] = "channel"
    """The index of the channel to swap: the peak's own, or its row modulo B (released code)."""
    redraw: bool = True
    """True if Q is drawn again for each step."""
    sample: Literal["peaks", "spaced", "both", "mean"] = "peaks"
    """The tokens to search on: those with the largest peaks of each block, evenly spaced ones, both of these, or the
    mean of the calibration windows."""
    rows: int = 512
    """The tokens of each kind that the search looks at in each block, and the number of weight rows."""
    start: Literal["identity", "moments"] = "identity"
    """The start of the search."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.rows < 1:
            raise ConfigError(f"transform outlier: steps and rows must be positive, got {self.steps} and {self.rows}")

        if self.start == "moments":
            hadamard_matrix(self.block)

    def check(self, weights: BlockFormat, activations: BlockFormat | None) -> None:
        """A score that rounds must see whole blocks of the rounded tensors."""
        if self.score == "joint":
            self._check_blocks("weights", weights)
        if self.score in ("error", "joint"):
            if activations is None:
                raise ConfigError('transform score = "error" or "joint" needs activations')
            self._check_blocks("activations", activations)

    def _check_blocks(self, what: str, format: BlockFormat) -> None:
        if format.block is None or self.block % format.block:
            raise ConfigError(
                f'transform score = "{self.score}" sees blocks of {self.block}, and {what} in {format.name} have '
                f"blocks of {format.block or 'a whole row'}"
            )

    @property
    def orthogonal(self) -> bool:  # type: ignore[override]
        return self.start == "identity"

    @property
    def needs(self) -> frozenset[str]:
        tokens = {"peaks", "spaced"} if self.sample == "both" else {self.sample}
        looks_at_moments = self.start == "moments" or self.score == "joint"
        return frozenset(tokens | {"moments"} if looks_at_moments else tokens)

    @property
    def tokens_kept(self) -> int:
        return self.rows

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> BlockDiagonal:
        start = SecondMoment(block=self.block).fit(sample, sharing, generator) if self.start == "moments" else None
        x = self._search_rows(sample, sharing)
        weights = moments = None
        if self.score == "joint":
            weights, moments = self._weight_rows(sample, sharing)
        if start is not None:
            matrices = start.matrices
            x = x @ matrices.to(x.dtype)
            if weights is not None and moments is not None:
                weights = weights @ start.inverse_transposes.to(x.dtype)
                moments = matrices.mT @ moments @ matrices
        operands = Operands(x.contiguous(), weights, moments)
        size = sample.block
        drawn = random_orthogonal(self.steps if self.redraw else 1, size - 1, generator, sample.device)
        mixed = torch.eye(size, dtype=torch.float64, device=sample.device).repeat(len(drawn), 1, 1)
        mixed[:, 1:, 1:] = drawn
        rotations = spreading_rotation(size).to(sample.device) @ mixed
        quantizers = sample.fake_quantize, sample.fake_quantize_weight
        search = partial(self._search, sample)
        found = [
            sample.replay(("outlier", self, *quantizers), search, rotations, *group.tensors())
            for group in operands.split(groups_at_once(size))
        ]
        rotation = BlockDiagonal(torch.cat(found))
        return rotation if start is None else start.compose(rotation)

    def fitting_bytes(self, size: FitSize) -> float:
        """The bytes of the rotations and the search. Each number of blocks has its own recorded search."""
        is_shared, B = size.sharing == "site", self.block
        together = 1 if is_shared else groups_at_once(B)
        groups = {min(together, width // B) for width in size.recorded or (size.width,)}
        rows = self.rows * (8 if is_shared else 1)
        searches = [count * (3 * 4.0 * rows * B + 3 * 8.0 * self.steps * B * B) for count in groups]
        return 3 * 8.0 * self.steps * B**2 + sum(searches)

    def fitting_work(self, size: FitSize) -> Work:
        """Units are numbers that one step rotates."""
        groups = size.width // self.block
        rows = self.rows * (8 if size.sharing == "site" else groups)
        return {"fitted": float(min(rows, max(1, size.tokens) * groups) * self.block * self.steps)}

    def trial(self, device: torch.device) -> tuple[Callable[[], object], float]:
        """A search for the smallest peak, for some blocks at once."""
        groups = 32 if device.type == "cuda" else 8
        plain = replace(self, sample="peaks", score="peak", start="identity", steps=min(self.steps, 16))
        blocks = torch.randn(groups, self.rows, self.block, device=device)
        weights = torch.zeros(1, groups * self.block, dtype=torch.float64, device=device)
        sample = SiteSample(weights, self.block, {"peaks": blocks})

        def search() -> BlockDiagonal:
            return plain.fit(sample, "block", torch.Generator().manual_seed(0))

        return search, float(blocks.numel() * plain.steps)

    def _search_rows(self, sample: SiteSample, sharing: Sharing) -> Tensor:
        """The rows that the search rotates: float32 [1 | G, rows, B]."""
        if self.sample == "mean":
            mean = sample.seen["mean"].unflatten(-1, (sample.groups, sample.block))
            return mean.flatten(0, 1)[None] if sharing == "site" else mean.transpose(0, 1).contiguous()
        parts = []
        if "peaks" in self.needs:
            peaks = sample.seen["peaks"]
            parts.append(peaks if sharing == "block" else _largest_rows(peaks, self.rows * 8))
        if "spaced" in self.needs:
            spaced = sample.seen["spaced"]
            parts.append(spaced if sharing == "block" else spaced.flatten(0, 1)[None])
        return torch.cat(parts, dim=1).contiguous()

    def _weight_rows(self, sample: SiteSample, sharing: Sharing) -> tuple[Tensor, Tensor]:
        """Evenly spaced rows of the weights, float32 [1 | G, rows, B], and S_x, float64 [1 | G, B, B]."""
        stride = max(1, len(sample.weights) // self.rows)
        rows = sample.weights[::stride].to(torch.float32).unflatten(-1, (-1, sample.block)).transpose(0, 1)
        moments = sample.seen["moments"]
        if sharing == "site":
            return rows.flatten(0, 1)[None], moments.mean(dim=0, keepdim=True)
        return rows.contiguous(), moments

    def _search(self, sample: SiteSample, rotations: Tensor, *tensors: Tensor) -> Tensor:
        """The best prefix product of each batch entry, float64 [batch, B, B].

        The operands are rotated step by step, while pivots and scores are recorded. The product of the kept steps is
        formed at the end.
        """
        operands = Operands(*tensors)
        x = operands.x
        single, swaps = rotations.to(x.dtype), swaps_with_first(x.shape[-1], x.device)
        scores, pivots = [], []
        for step in range(self.steps):
            score, pivot = self._look(operands, sample)
            scores.append(score)
            pivots.append(pivot)
            operands = operands.rotated(swapped(single[step % len(single)][None], swaps[pivot][None])[0])
        scores.append(self._look(operands, sample)[0])
        kept = torch.stack(scores).argmin(dim=0)
        steps = torch.arange(self.steps, device=x.device)[:, None]
        taken = swapped(rotations[steps[:, 0] % len(rotations)], swaps[torch.stack(pivots)])
        identity = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
        return ordered_product(torch.where((steps < kept)[..., None, None], taken, identity))

    def _look(self, operands: Operands, sample: SiteSample) -> tuple[Tensor, Tensor]:
        """The score to minimize and the channel to spread next, [batch] each."""
        x = operands.x
        if self.pivot == "channel":
            peak, pivot = torch.linalg.vector_norm(x, ord=torch.inf, dim=1).max(dim=1)
        else:
            peak, row = torch.linalg.vector_norm(x, ord=torch.inf, dim=2).max(dim=1)
            pivot = row % x.shape[-1]
        if self.score != "peak":
            assert sample.fake_quantize is not None
            lost = sample.fake_quantize(x) - x
            if self.score == "error":
                return lost.square().sum(dim=(1, 2)), pivot
            assert sample.fake_quantize_weight is not None
            return operands.output_error(lost, sample.fake_quantize_weight), pivot
        return (peak if self.peak == "abs" else x.amax(dim=(1, 2)) - x.amin(dim=(1, 2))), pivot


def _largest_rows(blocks: Tensor, count: int) -> Tensor:
    """The rows of `blocks` [G, rows, B] with the largest max |x|, in their order: [1, <= count, B]."""
    rows = blocks.flatten(0, 1)
    return rows[rows.abs().amax(dim=-1).topk(min(len(rows), count)).indices.sort().values][None]


def swaps_with_first(size: int, device: torch.device) -> Tensor:
    """Row c exchanges channels 0 and c: int64 [B, B]. It copies nothing from the CPU, so a GPU can record it."""
    channels = torch.arange(size, device=device)
    swaps = channels.repeat(size, 1).masked_fill(channels == channels[:, None], 0)
    swaps[:, 0] = channels
    return swaps


def swapped(rotations: Tensor, swaps: Tensor) -> Tensor:
    """E R E with the exchanges `swaps` as E: [n, B, B] and int64 [n, batch, B] to [n, batch, B, B]."""
    number = torch.arange(len(rotations), device=rotations.device)[:, None, None, None]
    return rotations[number, swaps[..., :, None], swaps[..., None, :]]


def ordered_product(matrices: Tensor) -> Tensor:
    """matrices[0] @ matrices[1] @ ..., [n, ..., B, B] to [..., B, B]; neighbours are multiplied first."""
    while len(matrices) > 1:
        pairs = matrices[: len(matrices) // 2 * 2]
        matrices = torch.cat([pairs[0::2] @ pairs[1::2], matrices[len(pairs) :]])
    return matrices[0]
