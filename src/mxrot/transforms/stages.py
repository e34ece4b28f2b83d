"""What an input transform is made of: a short tuple of stages, each an invertible matrix T on row vectors.

The inputs are multiplied by one stage after the other, the weights that read them by their inverse transposes
(x' = x T, W' = W T^-T), so that exactly x' W'^T = x W^T. A `StageSpec` says what a stage is, without tensors:
what a recipe promises and config.json holds. A stage has tensors, in float64; a checkpoint, what `Stage.stored` gives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.typed import check_fields

Sharing = Literal["site", "block"]

STORED_DTYPE = torch.bfloat16
"""The type that a checkpoint keeps sqrt(B) T in, and that runtimes apply T in."""

LARGEST_CONDITION = 1e10
"""Of a stored matrix; one that rounding has made singular has about 1e16 in float64."""

StoredTensors = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and types by name."""


SPECS: dict[str, type[StageSpec]] = {}
"""Every kind of stage that a checkpoint may name: the subclasses of `StageSpec`."""


@dataclass(frozen=True)
class StageSpec(ABC):
    """What a stage is, for inputs of any width; fields are plain values."""

    kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]] = ()
    """Of its tensors in a checkpoint."""

    def __init_subclass__(cls) -> None:
        SPECS[cls.kind] = cls

    def __post_init__(self) -> None:
        check_fields(self, f"stage {self.kind}")

    @property
    def multiple(self) -> int:
        """Widths that it takes are multiples of this."""
        return 1

    def check(self, width: int) -> None:
        """ConfigError unless there is such a stage for inputs of `width` channels."""
        if width % self.multiple:
            raise ConfigError(f"stage {self.kind}: {width} channels are not a multiple of {self.multiple}")

    @abstractmethod
    def tensors(self, width: int) -> StoredTensors:
        """What a checkpoint holds of one for `width` channels, by `names`; ConfigError as of `check`."""

    @abstractmethod
    def stage(self, stored: Mapping[str, Tensor]) -> Stage:
        """The stage as runtimes apply it, from what a checkpoint holds."""

    def problem(self, stored: Mapping[str, Tensor]) -> str | None:
        """What is wrong with tensors of the right shapes and types; None where nothing is."""
        return None

    def to_table(self) -> dict[str, Any]:
        """For JSON; `spec_from_table` reads it."""
        return {"kind": self.kind, **asdict(self)}


class Stage(ABC):
    """One factor of an input transform."""

    @property
    @abstractmethod
    def spec(self) -> StageSpec: ...

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """x T along the last dimension; float64 input in float64, all others in float32."""

    @abstractmethod
    def fold(self, weight: Tensor) -> Tensor:
        """W T^-T in float64 for `weight` [N, K]."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by the names of `StageSpec.tensors`."""

    @property
    def is_finite(self) -> bool:
        """Are all numbers of it and of its inverse finite?"""
        return True

    def as_applied(self) -> Stage:
        """This stage after the rounding of a checkpoint: fold weights against this one."""
        return self.spec.stage(self.stored())


@dataclass(frozen=True)
class BlockDiagonalSpec(StageSpec):
    """A matrix for each block of channels."""

    kind = "block-diagonal"
    names = ("weight",)

    block: int = 32
    """Channels that one matrix mixes, B."""
    sharing: Sharing = "site"
    """One matrix for all blocks, or one each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ConfigError(f"stage {self.kind}: block must be positive, got {self.block}")

    @property
    def multiple(self) -> int:
        return self.block

    def tensors(self, width: int) -> StoredTensors:
        """sqrt(B) T: [B, B] where one matrix serves all blocks or there is one block, else [G, B, B]."""
        self.check(width)
        one, groups = (self.block, self.block), width // self.block
        return {"weight": ((groups, *one) if self.sharing == "block" and groups > 1 else one, STORED_DTYPE)}

    def stage(self, stored: Mapping[str, Tensor]) -> BlockDiagonal:
        return BlockDiagonal.from_stored(stored["weight"])

    def problem(self, stored: Mapping[str, Tensor]) -> str | None:
        matrices = stored["weight"].detach().to("cpu", torch.float64)
        inverses, failed = torch.linalg.inv_ex(matrices)
        conditions = torch.linalg.matrix_norm(matrices) * torch.linalg.matrix_norm(inverses)
        is_invertible = not bool(failed.any()) and bool((conditions < LARGEST_CONDITION).all())
        return None if is_invertible else "a transform without an inverse"


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Stage):
    """x_g -> x_g T_g for each block g."""

    matrices: Tensor
    """T, float64 [1, B, B] (shared by all blocks) or [G, B, B]."""

    @staticmethod
    def identity(block: int, device: torch.device | str = "cpu") -> BlockDiagonal:
        return BlockDiagonal(torch.eye(block, dtype=torch.float64, device=device)[None])

    @staticmethod
    def diagonal(values: Tensor, block: int) -> BlockDiagonal:
        """x_j -> x_j * values_j; `values` [K] with K a multiple of `block`."""
        return BlockDiagonal(torch.diag_embed(values.double().unflatten(0, (-1, block))))

    @property
    def block(self) -> int:
        return self.matrices.shape[-1]

    @property
    def spec(self) -> BlockDiagonalSpec:
        return BlockDiagonalSpec(self.block, "site" if len(self.matrices) == 1 else "block")

    @cached_property
    def inverse_transposes(self) -> Tensor:
        """T^-T, float64, shape of `matrices`."""
        return torch.linalg.inv(self.matrices).transpose(-1, -2)

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.matrices).all() and torch.isfinite(self.inverse_transposes).all())

    def compose(self, after: BlockDiagonal) -> BlockDiagonal:
        """The transform that applies this one first, then `after`."""
        return BlockDiagonal(self.matrices @ after.matrices)

    def apply(self, x: Tensor) -> Tensor:
        work = working_type(x)
        return apply_matrices(x.to(work), self.matrices.to(work))

    def fold(self, weight: Tensor) -> Tensor:
        return apply_matrices(weight.double(), self.inverse_transposes)

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self.to_stored()}

    def to_stored(self) -> Tensor:
        """bf16(sqrt(B) T), [B, B] where all blocks share T, else [G, B, B]."""
        stored = (self.matrices * math.sqrt(self.block)).to(STORED_DTYPE)
        return stored[0] if stored.shape[0] == 1 else stored

    @staticmethod
    def from_stored(stored: Tensor) -> BlockDiagonal:
        """What a runtime applies: bf16(stored / sqrt(B)), the division in float32, as float64."""
        effective = _opaquely_applied(stored) if torch.compiler.is_compiling() else _applied(stored)
        return BlockDiagonal(effective if effective.dim() == 3 else effective[None])

    def as_applied(self) -> BlockDiagonal:
        return self.from_stored(self.to_stored())


def _applied(stored: Tensor) -> Tensor:
    return (stored.float() / math.sqrt(stored.shape[-1])).to(STORED_DTYPE).double()


@torch.library.custom_op("mxrot::applied_blocks", mutates_args=())
def _opaquely_applied(stored: Tensor) -> Tensor:
    """The same as one operation for compilers, which leave out a rounding that they can see."""
    return _applied(stored).contiguous()


@_opaquely_applied.register_fake
def _applied_shape(stored: Tensor) -> Tensor:
    return torch.empty_like(stored, dtype=torch.float64, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class PermutationSpec(StageSpec):
    """Channels in another order."""

    kind = "permutation"
    names = ("order",)

    def tensors(self, width: int) -> StoredTensors:
        return {"order": ((width,), torch.int32)}

    def stage(self, stored: Mapping[str, Tensor]) -> Permutation:
        return Permutation(stored["order"].long())

    def problem(self, stored: Mapping[str, Tensor]) -> str | None:
        order = stored["order"]
        whole = torch.arange(len(order), device=order.device)
        return None if torch.equal(order.long().sort().values, whole) else "an order that is no permutation"


@dataclass(frozen=True, eq=False)
class Permutation(Stage):
    """x'_j = x_order(j): a matrix of 0 and 1, which is its own inverse transpose. No number changes."""

    order: Tensor
    """int64 [K]."""

    @property
    def spec(self) -> PermutationSpec:
        return PermutationSpec()

    def apply(self, x: Tensor) -> Tensor:
        return x.to(working_type(x)).index_select(-1, self.order)

    def fold(self, weight: Tensor) -> Tensor:
        return self.apply(weight.double())

    def stored(self) -> dict[str, Tensor]:
        return {"order": self.order.to(torch.int32)}


def spec_from_table(table: Mapping[str, Any]) -> StageSpec:
    """The spec that `StageSpec.to_table` wrote; ConfigError names what is wrong with it."""
    values = dict(table)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in SPECS:
        raise ConfigError(f"stage kind {kind!r} is not known; known: {', '.join(SPECS)}")
    known = {field.name for field in fields(SPECS[kind])}
    if values.keys() != known:
        raise ConfigError(f"stage {kind}: expected the keys {sorted(known)}, got {sorted(map(str, values))}")
    return SPECS[kind](**values)


def apply_matrices(x: Tensor, matrices: Tensor) -> Tensor:
    """x_g @ matrices_g for x [..., G * B] and matrices [1 | G, B, B] of the same dtype."""
    blocks = x.unflatten(-1, (-1, matrices.shape[-1]))
    if matrices.shape[0] == 1:
        return (blocks @ matrices[0]).flatten(-2)
    return torch.einsum("...gb,gbc->...gc", blocks, matrices).flatten(-2)


def working_type(x: Tensor) -> torch.dtype:
    """What stages compute in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
