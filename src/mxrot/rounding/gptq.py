"""GPTQ (arXiv 2210.17323) for block formats, with both orders of scales of MR-GPTQ (2509.23202, section 4).

Columns are rounded one after the other. The error of each is spread over the columns not yet rounded, along the inverse
Hessian of the inputs. The scales of a block must be fixed before its first column is rounded:

- `scales = "reached"` takes them from the updated weights when the walk reaches the block.
- `scales = "walked"` also walks the block under the neighbouring exponents. For each row it keeps the exponent with the
  least cost in the objective (the block's part of sum_j (difference_j / U_jj)^2).
- `scales = "fixed"` takes all of them from the weights before the walk. Only then may `columns = "descending"` walk in
  order of decreasing diagonal of H, where the columns of a block need not be neighbours (codes are put back in place
  afterwards; nothing is permuted at run time).

`target` is what the quantized linear should reproduce. "own": the output of the weights on the inputs it will really
see. "original": the output of the original linear in the original model, which makes up for part of the error of all
earlier layers (GPTAQ, arXiv 2504.02692; Qronos, 2505.11695). "residual" (ours): for outputs added to the residual
stream, what is missing there from the original's. With D the target minus the own output, and x the quantized inputs,
the quadratic objective has its minimum at W + E[D^T x] (H + d I)^-1. GPTQ starts from there, and nothing else changes.

`first_column = "crossed"` is from Qronos (arXiv 2505.11695): with a target, the first column is rounded from its
minimum with the other columns fixed, w + E[d^T x]_1 / (H + d I)_11, instead of the joint minimum. The rest is GPTQ,
which solves for the other columns again, whatever the first became. `damping_of = "largest"` is also from Qronos:
damping relative to the largest eigenvalue of H. `first_order` b is FOEM's term (arXiv 2507.11017): with each rounded
column, the open columns go back by the share b of their move so far (`walk_drawn_back`), one column at a time and
without a kernel.

`inputs` chooses the inputs of H: those that the linear will really see or, as in MR-GPTQ, the same before quantization.

`dampings` and `target_dampings` are candidates; each site takes those with the least error on unseen tokens
(held_out.py).

All arithmetic is float64. If H is a multiple of the identity, nothing is spread and the codes equal rounding to nearest
bit for bit (except that a weight of -0 may become +0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.formats import Format, ScaleRule, as_blocks, check_finite, check_parts, encode_blocks
from mxrot.rounding.base import Inputs, Prepared, Requirements, Rounded, RoundingMethod, Target
from mxrot.rounding.held_out import Fold, Spread, choose_damping, choose_target_damping, energy, spaced_rows
from mxrot.rounding.linalg import Measure, damping_unit, inverse_factor
from mxrot.rounding.walk import SPAN, walk_fixed, walk_reached, walks_whole_blocks

NEIGHBOURS = (0, -1, 1)
"""The exponents that `scales = "walked"` tries, relative to the rule's. In a tie the first is kept."""


@dataclass(frozen=True)
class GPTQ(RoundingMethod):
    """Error-compensated rounding along the Hessian of the quantized inputs."""

    name = "gptq"

    damping: float = 0.01
    """The damping added to the diagonal of H, relative to its mean."""
    scales: Literal["reached", "walked", "fixed"] = "reached"
    columns: Literal["natural", "descending"] = "natural"
    target: Target = "own"
    target_damping: float = 0.01
    """Like `damping`, for the regression towards the target."""
    inputs: Inputs = "quantized"
    """The inputs of H: as the linear will really see them, or before quantization (MR-GPTQ)."""
    tokens: Literal["equal", "relative"] = "equal"
    """The weight of each token: equal, or relative to the size of the residual stream for outputs that go into it."""
    damping_of: Measure = "mean"
    """What both dampings are relative to: the mean of H's diagonal, or its largest eigenvalue."""
    first_column: Literal["joint", "crossed"] = "joint"
    """Where the first column is rounded from: the minimum over all columns, or over this column alone."""
    first_order: float = 0.0
    """The share of their move so far that open columns lose with each rounded column."""
    dampings: tuple[float, ...] = ()
    """Candidates for `damping`. Each site takes the one with the least error on held-out tokens. If empty, `damping` is
    used."""
    target_dampings: tuple[float, ...] = ()
    """Candidates for `target_damping`. Infinity means the target "own". With that target there is nothing to choose."""
    folds: Literal["windows", "kinds"] = "kinds"
    """What candidates are measured on: held-out windows of all kinds of text, or the text of one kind after a fit to
    the other (docs/methods.md)."""

    @property
    def requirements(self) -> Requirements:
        chooses = self.dampings or self.chooses_target
        relative = self.tokens == "relative"
        return Requirements(True, self.target, relative, self.inputs, self.folds if chooses else "none")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("damping", "target_damping"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"rounding gptq: {key} must be positive and finite, got {getattr(self, key)}")
        for key, most in (("dampings", False), ("target_dampings", True)):
            for value in getattr(self, key):
                if not (0 < value < math.inf or (most and value == math.inf)):
                    kind = "positive" if most else "positive and finite"
                    raise ConfigError(f"rounding gptq: {key} must be {kind}, got {value}")
        if self.inputs == "unquantized" and self.target != "own":
            raise ConfigError(
                f'rounding gptq: target = "{self.target}" makes up for what quantized inputs lack, and needs inputs = '
                '"quantized"'
            )
        if self.first_column == "crossed" and self.target == "own":
            raise ConfigError(
                'rounding gptq: first_column = "crossed" is about a target, and target = "own" has none; set target = '
                '"original" or "residual"'
            )
        if not 0 <= self.first_order < 1:
            raise ConfigError(f"rounding gptq: first_order must be at least 0 and below 1, got {self.first_order}")
        if self.first_order and self.scales == "walked":
            raise ConfigError(
                'rounding gptq: first_order goes a column at a time, and scales = "walked" a block; set scales = '
                '"reached"'
            )
        if self.scales != "fixed" and self.columns == "descending":
            raise ConfigError('rounding gptq: columns = "descending" needs scales = "fixed"')

    @property
    def target_strength(self) -> float:
        return 0.0 if self.target == "own" else 1 / self.target_damping

    @property
    def chooses_target(self) -> bool:
        return bool(self.target_dampings) and self.target != "own"

    @property
    def tried_targets(self) -> int:
        return sum(not math.isinf(damping) for damping in self.target_dampings) if self.chooses_target else 0

    @property
    def tried_dampings(self) -> int:
        return len(self.dampings)

    @property
    def candidates(self) -> int:
        return len(NEIGHBOURS) if self.scales == "walked" else 1

    @property
    def mends_later_columns(self) -> bool:
        return self.columns == "natural"

    def check(self, format: Format, rule: ScaleRule) -> None:
        if self.scales != "fixed" and format.grid.looks_at_whole_tensor(rule):
            raise ConfigError(
                f"rounding gptq: the scale rule {rule.name!r} of {format.name} looks at the whole tensor; "
                'set scales = "fixed"'
            )
        if self.scales == "walked" and not rule.is_power_of_two:
            raise ConfigError(f'rounding gptq: scales = "walked" needs power-of-two scales, not rule {rule.name!r}')
        if self.scales == "walked" and not walks_whole_blocks(format):
            raise ConfigError(
                f'rounding gptq: scales = "walked" needs blocks of one scale and at most {SPAN} elements, which '
                f"{format.name} has not"
            )

    def chosen(
        self,
        folds: Sequence[Fold],
        weight: Tensor,
        format: Format,
        rule: ScaleRule,
        name: str,
        spread: Spread | None = None,
    ) -> GPTQ:
        found = replace(self, dampings=(), target_dampings=())
        if not folds:
            return found
        if self.chooses_target:
            energies = [energy(weight, fold.unseen) for fold in folds]

            def factor_of(damping: float, hessian: Tensor) -> Tensor:
                return inverse_factor(hessian, damping, name, relative_to=self.damping_of)[0]

            strength = choose_target_damping(folds, energies, self.target_dampings, factor_of, spread)
            if math.isinf(strength):
                found = replace(found, target="own", first_column="joint")
            else:
                found = replace(found, target_damping=strength)
        if self.dampings:
            rows = weight[spaced_rows(len(weight)).to(weight.device)]
            energies = [energy(rows, fold.unseen) for fold in folds]

            def errors_of(damping: float, hessian: Tensor) -> Tensor:
                tried = replace(found, damping=damping)
                rounded = tried.round(rows, format, rule, hessian, name)
                return rounded.weight.dequantize(torch.float64) - rows

            found = replace(found, damping=choose_damping(folds, energies, self.dampings, errors_of, spread))
        return found

    def prepare(self, hessian: Tensor | None, shifts: Sequence[Tensor], name: str) -> Prepared:
        assert hessian is not None
        order = None
        if self.columns == "descending":
            order = hessian.diagonal().argsort(descending=True, stable=True)
        first = 0 if order is None else int(order[0])
        crossed = self._crossed(hessian, shifts, first)
        if shifts:
            # First, and freed: it needs the Hessian as it is, and the factor will overwrite that.
            regression, _ = inverse_factor(hessian, self.target_damping, name, relative_to=self.damping_of)
            for shift in shifts:
                shift.copy_((shift @ regression.t()) @ regression)
            del regression
        if order is not None:
            hessian = hessian[order[:, None], order]
        factor, damping = inverse_factor(hessian, self.damping, name, overwrites=True, relative_to=self.damping_of)
        if crossed:
            _move_first(shifts, crossed, first, factor, order)
        return Prepared(factor, order, damping)

    def _crossed(self, hessian: Tensor, shifts: Sequence[Tensor], first: int) -> list[Tensor]:
        """The moved first column [n] of each shift if the others stay fixed; empty for the joint minimum."""
        if self.first_column == "joint" or not shifts:
            return []
        added = self.target_damping * damping_unit(hessian, self.damping_of)
        return [shift[:, first] / (hessian[first, first] + added) for shift in shifts]

    def round_rows(
        self, weight: Tensor, format: Format, rule: ScaleRule, prepared: Prepared, name: str, move: Tensor | None = None
    ) -> Rounded:
        factor, order = prepared.factor, prepared.order
        assert factor is not None
        check_finite(weight, name)
        weight = weight.double()
        if move is not None:
            weight = weight + move
        if order is None:
            order = torch.arange(weight.shape[1], device=weight.device)
        blocks = as_blocks(weight, format, name)
        if self.scales == "fixed":
            parts = format.grid.choose(blocks, rule)
            rounded, remainder = walk_fixed(blocks, factor, parts, order, format, self.first_order)
        else:
            offsets = NEIGHBOURS if self.scales == "walked" else NEIGHBOURS[:1]
            rounded, remainder, parts = walk_reached(blocks, factor, format, rule, offsets, self.first_order)
        check_parts(parts, format, weight, name)
        return Rounded(encode_blocks(rounded, parts, format), remainder, prepared.damping)


def _move_first(
    moves: Sequence[Tensor], crossed: Sequence[Tensor], first: int, factor: Tensor, order: Tensor | None
) -> None:
    """Set the first column [n] of each move [n, K] to that of `crossed`, in place.

    The other columns are set so that the walk corrects them as if the first column had stayed in place: rounding it to
    q leaves them at w - (w_1 - q) U_1 / U_11 either way.
    """
    ratios = factor[0] / factor[0, 0]
    if order is not None:
        ratios = torch.empty_like(ratios).index_copy_(0, order, ratios)
    for move, wanted in zip(moves, crossed, strict=True):
        move.addr_(wanted - move[:, first], ratios)
