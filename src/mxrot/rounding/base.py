"""What a rounding method is: real weights in, codes and scales out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mxrot.formats import Format, QTensor, ScaleRule
from mxrot.rounding.held_out import Fold, Spread
from mxrot.typed import check_fields

Target = Literal["own", "original", "residual"]
"""What a quantized linear shall reproduce: its own output on the inputs it will see, that of the original linear in
the original model, or what the residual stream lacks of the original's."""

Inputs = Literal["quantized", "unquantized"]
"""Which inputs a Hessian is of: those that a linear will see, or the same before they are quantized."""


@dataclass(frozen=True)
class Requirements:
    """What a rounding method wants to know of the inputs of a site."""

    hessian: bool = False
    target: Target = "own"
    """What the `shift` leads to; none for "own"."""
    relative: bool = False
    """Where outputs go into the residual stream, count each token's error relative to the size of the stream."""
    inputs: Inputs = "quantized"
    """What the Hessian is of; transformed they are."""
    folds: Literal["none", "windows", "kinds"] = "none"
    """What `chosen` wants to see: nothing, tokens of windows that are held out, or those of the other kind of text."""


@dataclass(frozen=True)
class Rounded:
    """Quantized weights and what it took."""

    weight: QTensor
    remainder: Tensor
    """What rounding took away from each weight as it found it, float64 [N, K]."""
    damping: float | None = None
    """Damping of the Hessian that let it factorize, relative to its mean diagonal; None where there was none."""


@dataclass(frozen=True)
class Prepared:
    """What a method has made of the statistics of a site; all of its weights are rounded with it."""

    factor: Tensor | None = None
    """Upper triangular [K, K], float64: of the inverse of the damped Hessian, its channels in `order`."""
    order: Tensor | None = None
    """The order in which the columns are rounded, [K]."""
    damping: float | None = None
    """As in `Rounded`."""


@dataclass(frozen=True)
class RoundingMethod(ABC):
    """Rounds the weights of one site. Fields are its options, and its keys in a recipe.

    First `prepare`, once, then `round_rows`, for some rows after the other: no row's codes depend on another's, unless
    a scale looks at the whole tensor. Rows that are rounded apart get the same bits wherever a product of matrices
    sums a row in the same order for any number of rows.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self, f"rounding {self.name}")

    @property
    def requirements(self) -> Requirements:
        """Nothing by default."""
        return Requirements()

    @property
    def target_strength(self) -> float:
        """1 / the damping of the way to the target; 0 where there is none but its own output."""
        return 0.0

    @property
    def chooses_target(self) -> bool:
        """Does `chosen` decide about that?"""
        return False

    @property
    def tried_targets(self) -> int:
        """Regressions that `chosen` tries for each fold."""
        return 0

    @property
    def tried_dampings(self) -> int:
        """The same of roundings of a sample of rows."""
        return 0

    @property
    def candidates(self) -> int:
        """Scales that each block is rounded under before one is kept: how often the work is done."""
        return 1

    @property
    def mends_later_columns(self) -> bool:
        """Do columns make up for what those before them have lost, from the first to the last?"""
        return False

    def check(self, format: Format, rule: ScaleRule) -> None:
        """ConfigError if this method cannot round to `format` under `rule`."""
        return

    def chosen(
        self,
        folds: Sequence[Fold],
        weight: Tensor,
        format: Format,
        rule: ScaleRule,
        name: str,
        spread: Spread | None = None,
    ) -> RoundingMethod:
        """This method with the options that leave least on unseen tokens, for a site whose folded rows are `weight`
        [N, K] float64; itself where it does not choose. `spread` shares what has to be tried among processes."""
        return self

    def prepare(self, hessian: Tensor | None, shifts: Sequence[Tensor], name: str) -> Prepared:
        """What rounding needs of `hessian` [K, K], the mean of x^T x over the inputs that `requirements` names.

        `shifts` [n, K], of so many rows each, are the mean of d^T x, with d what the outputs lack of the target; none
        for the target "own". Both are overwritten: there is no Hessian left, and each shift has become the move of its
        rows towards the target. NumericsError, with `name`, if there is nothing to be made of the Hessian.
        """
        return Prepared()

    @abstractmethod
    def round_rows(
        self, weight: Tensor, format: Format, rule: ScaleRule, prepared: Prepared, name: str, move: Tensor | None = None
    ) -> Rounded:
        """Codes and scales of `weight` [n, K], some rows or all of them; with `move` [n, K] it is added first.

        NumericsError, with `name`, if a weight is NaN or Inf or a block scale overflows.
        """

    def round(
        self,
        weight: Tensor,
        format: Format,
        rule: ScaleRule,
        hessian: Tensor | None,
        name: str,
        shift: Tensor | None = None,
    ) -> Rounded:
        """Both steps for a whole `weight` [N, K]; its `hessian` and `shift` [N, K] stay as they are."""
        move = None if shift is None else shift.clone()
        own = None if hessian is None else hessian.clone()
        prepared = self.prepare(own, [] if move is None else [move], name)
        return self.round_rows(weight, format, rule, prepared, name, move)
