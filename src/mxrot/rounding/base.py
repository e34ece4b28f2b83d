"""What a rounding method is: real weights in, codes and scales out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mxrot.formats import Format, QTensor, ScaleRule
from mxrot.typed import check_fields

Target = Literal["own", "original", "residual"]
"""What a quantized linear shall reproduce: its own output on the inputs it will see, that of the original linear in
the original model, or what the residual stream lacks of the original's."""


@dataclass(frozen=True)
class Requirements:
    """What a rounding method wants to know of the inputs of a site."""

    hessian: bool = False
    target: Target = "own"
    """What the `shift` leads to; none for "own"."""
    relative: bool = False
    """Where outputs go into the residual stream, count each token's error relative to the size of the stream."""


@dataclass(frozen=True)
class Rounded:
    """Quantized weights and what it took."""

    weight: QTensor
    remainder: Tensor
    """What rounding took away from each weight as it found it, float64 [N, K]."""
    damping: float | None = None
    """Damping of the Hessian that let it factorize, relative to its mean diagonal; None where there was none."""


@dataclass(frozen=True)
class RoundingMethod(ABC):
    """Rounds the weights of one site. Fields are its options, and its keys in a recipe."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self, f"rounding {self.name}")

    @property
    def requirements(self) -> Requirements:
        """Nothing by default."""
        return Requirements()

    def check(self, format: Format, rule: ScaleRule) -> None:
        """ConfigError if this method cannot round to `format` under `rule`."""
        return

    @abstractmethod
    def round(
        self,
        weight: Tensor,
        format: Format,
        rule: ScaleRule,
        hessian: Tensor | None,
        name: str,
        shift: Tensor | None = None,
    ) -> Rounded:
        """Codes and scales of `weight` [N, K].

        `hessian` [K, K] is the mean of x^T x over the inputs that the linear will really see; None where the
        method does not need it. `shift` [N, K] is the mean of d^T x, with d what the outputs lack of the target;
        None for the target "own". NumericsError, with `name`, if a weight is NaN or Inf or a block scale overflows.
        """
