"""What is stored beside the codes of a quantized tensor: named tensors, most of them with one entry a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PartSpec:
    """The name, the type and the shape of one part; in a checkpoint it is called `weight_<name>`."""

    name: str
    dtype: torch.dtype
    bits: int
    """Bits of information an entry has; its type may have more."""
    per: Literal["block", "row", "tensor"] = "block"
    """What has an entry of its own."""
    shape: tuple[int, ...] = ()
    """Of one entry."""

    def shape_of(self, rows: int, blocks: int) -> tuple[int, ...]:
        """The shape for a matrix of so many rows, of so many blocks each."""
        places = {"block": (rows, blocks), "row": (rows, 1), "tensor": ()}
        return (*places[self.per], *self.shape)


class Parts(ABC):
    """Named tensors: [..., G, *entry] with an entry a block, [..., 1, *entry] a row, [] the whole tensor."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """By name; those of the whole tensor are scalars."""

    @abstractmethod
    def with_tensors(self, tensors: dict[str, Tensor]) -> Parts:
        """Parts of the same kind and names that hold these."""

    def split_rows(self, rows: list[int]) -> list[Parts]:
        """The parts of matrices of so many rows each, of those of one above the other; scalars belong to all."""
        split = {
            name: [tensor] * len(rows) if tensor.dim() == 0 else list(tensor.split(rows))
            for name, tensor in self.tensors.items()
        }
        return [
            self.with_tensors({name: tensors[index] for name, tensors in split.items()}) for index in range(len(rows))
        ]

    def of_blocks(self, blocks: Tensor | slice) -> Parts:
        """The parts of some blocks of a matrix, by their places in the row; what is a row's or a tensor's stays."""
        return self.with_tensors(
            {
                name: tensor if tensor.dim() == 0 or tensor.shape[1] == 1 else tensor[:, blocks]
                for name, tensor in self.tensors.items()
            }
        )

    @staticmethod
    def side_by_side(parts: Sequence[Parts]) -> Parts:
        """The parts of matrices beside each other; scalars are those of the first."""
        return Parts._together(parts, 1)

    @staticmethod
    def one_above_other(parts: Sequence[Parts]) -> Parts:
        """The parts of matrices with other rows, and of all of them together; scalars are those of the first."""
        return Parts._together(parts, 0)

    @staticmethod
    def _together(parts: Sequence[Parts], dim: int) -> Parts:
        first = parts[0]
        return first.with_tensors(
            {
                name: tensor if tensor.dim() == 0 else torch.cat([each.tensors[name] for each in parts], dim=dim)
                for name, tensor in first.tensors.items()
            }
        )


@dataclass(frozen=True)
class NamedParts(Parts):
    """The parts of a grid that has no record of its own for them."""

    named: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.named

    def with_tensors(self, tensors: dict[str, Tensor]) -> NamedParts:
        return NamedParts(tensors)
