"""The interface of rounding methods: real weights in, codes and scales out."""

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
"""What a quantized linear should reproduce: its own output on the inputs it will see, the output of the original linear
in the original model, or what the residual stream lacks compared with the original's."""

Inputs = Literal["quantized", "unquantized"]
"""The inputs of the Hessian: those that the linear will see, or the same before quantization."""


@dataclass(frozen=True)
class Requirements:
    """The statistics of a site's inputs that a rounding method needs."""

    hessian: bool = False
    target: Target = "own"
    """The target that `shift` leads to. "own" has no shift."""
    relative: bool = False
    """True if the error of each token counts relative to the size of the residual stream, for outputs that go into
    it."""
    inputs: Inputs = "quantized"
    """The inputs of the Hessian, always after the transform."""
    folds: Literal["none", "windows", "kinds"] = "none"
    """The held-out tokens that `chosen` needs: none, those of held-out windows, or those of the other kind of text."""


@dataclass(frozen=True)
class Rounded:
    """Quantized weights, with error and damping."""

    weight: QTensor
    remainder: Tensor
    """Each weight before rounding, at its turn, minus its rounded value, float64 [N, K]."""
    damping: float | None = None
    """The damping with which the Hessian could be factorized, relative to its mean diagonal. None without a Hessian."""


@dataclass(frozen=True)
class Prepared:
    """What a method computes from the statistics of a site, to round all of its weights."""

    factor: Tensor | None = None
    """float64 [K, K], upper triangular: the factor of the inverse of the damped Hessian, with channels in `order`."""
    order: Tensor | None = None
    """[K], the order in which columns are rounded."""
    damping: float | None = None
    """As in `Rounded`."""


@dataclass(frozen=True)
class RoundingMethod(ABC):
    """Rounds the weights of one site. Fields are its options, and its keys in a recipe.

    Call `prepare` once, then `round_rows` for one group of rows after another. The codes of a row do not depend on
    other rows, unless a scale depends on the whole tensor. Rows rounded separately get the same bits if matrix products
    sum each row in the same order, whatever the number of rows.
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
        """1 / the damping of the move towards the target; 0 if the target is "own"."""
        return 0.0

    @property
    def chooses_target(self) -> bool:
        """True if `chosen` chooses that damping."""
        return False

    @property
    def tried_targets(self) -> int:
        """The number of regressions that `chosen` tries for each fold."""
        return 0

    @property
    def tried_dampings(self) -> int:
        """Roundings of a sample of rows tried per fold."""
        return 0

    @property
    def candidates(self) -> int:
        """The number of scales tried for each block; the work grows by this factor."""
        return 1

    @property
    def mends_later_columns(self) -> bool:
        """True if columns, from the first to the last, make up for the errors of those before them."""
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
        """This method with the options of least error on unseen tokens, for folded `weight` [N, K] float64 of a site.

        A method without choices returns itself. `spread` shares the trials among processes.
        """
        return self

    def prepare(self, hessian: Tensor | None, shifts: Sequence[Tensor], name: str) -> Prepared:
        """What rounding needs of `hessian` [K, K], the mean of x^T x over the inputs that `requirements` names.

        Each of `shifts` [n, K] is the mean of d^T x for n rows, where d is the target minus the output; none for the
        target "own". Both are overwritten: the Hessian is lost, and each shift becomes the move of its rows towards the
        target. NumericsError, with `name`, if the Hessian is unusable.
        """
        return Prepared()

    @abstractmethod
    def round_rows(
        self, weight: Tensor, format: Format, rule: ScaleRule, prepared: Prepared, name: str, move: Tensor | None = None
    ) -> Rounded:
        """The codes and scales of `weight` [n, K], which may be some of the rows. `move` [n, K] is added first, if
        given.

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
        """Both steps for a whole `weight` [N, K]. `hessian` and `shift` [N, K] are not changed."""
        move = None if shift is None else shift.clone()
        own = None if hessian is None else hessian.clone()
        prepared = self.prepare(own, [] if move is None else [move], name)
        return self.round_rows(weight, format, rule, prepared, name, move)
