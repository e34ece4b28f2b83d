"""The stages of an input transform, a short tuple. Each is an invertible matrix T on row vectors.

The inputs are multiplied by one stage after the other, and the weights that read them by the inverse transposes
(x' = x T, W' = W T^-T), so that exactly x' W'^T = x W^T. A `StageSpec` describes a stage without tensors; recipes and
config.json use it. A stage has tensors in float64. A checkpoint has those of `Stage.stored`.
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
"""The type in which a checkpoint stores sqrt(B) T, and in which runtimes apply T."""

LARGEST_CONDITION = 1e10
"""The largest condition number of a stored matrix. Rounding that makes it singular gives about 1e16 in float64."""

StoredTensors = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and types by name."""


SPECS: dict[str, type[StageSpec]] = {}
"""Every kind of stage that a checkpoint may contain: the subclasses of `StageSpec`."""


@dataclass(frozen=True)
class StageSpec(ABC):
    """The description of a stage, for inputs of any width. Its fields are plain values."""

    kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]] = ()
    """The names of its tensors in a checkpoint."""

    def __init_subclass__(cls) -> None:
        SPECS[cls.kind] = cls

    def __post_init__(self) -> None:
        check_fields(self, f"stage {self.kind}")

    @property
    def multiple(self) -> int:
        """The width must be a multiple of this."""
        return 1

    def check(self, width: int) -> None:
        """Raise ConfigError if no such stage exists for inputs of `width` channels."""
        if width % self.multiple:
            raise ConfigError(f"stage {self.kind}: {width} channels are not a multiple of {self.multiple}")

    @abstractmethod
    def tensors(self, width: int) -> StoredTensors:
        """The tensors in a checkpoint for `width` channels, by `names`. ConfigError as for `check`."""

    @abstractmethod
    def stage(self, stored: Mapping[str, Tensor]) -> Stage:
        """The stage as runtimes apply it, from the tensors of a checkpoint."""

    def problem(self, stored: Mapping[str, Tensor]) -> str | None:
        """The problem of tensors with the right shapes and types; None if they are valid."""
        return None

    def to_table(self) -> dict[str, Any]:
        """A JSON table, which `spec_from_table` reads."""
        return {"kind": self.kind, **asdict(self)}


class Stage(ABC):
    """One factor of an input transform."""

    @property
    @abstractmethod
    def spec(self) -> StageSpec: ...

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """x T along the last dimension; float64 for float64 input, else float32."""

    @abstractmethod
    def fold(self, weight: Tensor) -> Tensor:
        """W T^-T in float64 for `weight` [N, K]."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint, by the names of `StageSpec.tensors`."""

    @property
    def is_finite(self) -> bool:
        """True if all its numbers and those of its inverse are finite."""
        return True

    def as_applied(self) -> Stage:
        """This stage after the rounding of a checkpoint. Weights are folded against this one."""
        return self.spec.stage(self.stored())


@dataclass(frozen=True)
class BlockDiagonalSpec(StageSpec):
    """One matrix for each block of channels."""

    kind = "block-diagonal"
    names = ("weight",)

    block: int = 32
    """The channels that one matrix mixes, B."""
    sharing: Sharing = "site"
    """One matrix for all blocks, or one for each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ConfigError(f"stage {self.kind}: block must be positive, got {self.block}")

    @property
    def multiple(self) -> int:
        return self.block

    def tensors(self, width: int) -> StoredTensors:
        """sqrt(B) T: [B, B] if one matrix serves all blocks or there is one block, else [G, B, B]."""
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
        """x_j -> x_j * values_j, for `values` [K] with K a multiple of `block`."""
        return BlockDiagonal(torch.diag_embed(values.double().unflatten(0, (-1, block))))

    @property
    def block(self) -> int:
        return self.matrices.shape[-1]

    @property
    def spec(self) -> BlockDiagonalSpec:
        return BlockDiagonalSpec(self.block, "site" if len(self.matrices) == 1 else "block")

    @cached_property
    def inverse_transposes(self) -> Tensor:
        """T^-T, float64, in the shape of `matrices`."""
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
        """bf16(sqrt(B) T): [B, B] if all blocks share T, else [G, B, B]."""
        stored = (self.matrices * math.sqrt(self.block)).to(STORED_DTYPE)
        return stored[0] if stored.shape[0] == 1 else stored

    @staticmethod
    def from_stored(stored: Tensor) -> BlockDiagonal:
        """The stage that a runtime applies: bf16(stored / sqrt(B)), with the division in float32, as float64."""
        effective = _opaquely_applied(stored) if torch.compiler.is_compiling() else _applied(stored)
        return BlockDiagonal(effective if effective.dim() == 3 else effective[None])

    def as_applied(self) -> BlockDiagonal:
        return self.from_stored(self.to_stored())


def _applied(stored: Tensor) -> Tensor:
    return (stored.float() / math.sqrt(stored.shape[-1])).to(STORED_DTYPE).double()


@torch.library.custom_op("mxrot::applied_blocks", mutates_args=())
def _opaquely_applied(stored: Tensor) -> Tensor:
    """The same, as one opaque operation: compilers omit a rounding that they can see."""
    return _applied(stored).contiguous()


@_opaquely_applied.register_fake
def _applied_shape(stored: Tensor) -> Tensor:
    return torch.empty_like(stored, dtype=torch.float64, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class PermutationSpec(StageSpec):
    """A permutation of the channels."""

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
    """x'_j = x_order(j): a matrix of 0 and 1, its own inverse transpose. No number changes."""

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
    """The spec that `StageSpec.to_table` wrote. ConfigError names the problem if it is invalid."""
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
    """The type in which stages compute: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
