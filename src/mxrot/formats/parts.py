"""What is stored beside the codes of a quantized tensor: named tensors, most of them with one entry per block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PartSpec:
    """The name, type and shape of one part. Its name in a checkpoint is `weight_<name>`."""

    name: str
    dtype: torch.dtype
    bits: int
    """The bits of information in an entry. Its type may have more."""
    per: Literal["block", "row", "tensor"] = "block"
    """What each entry belongs to."""
    shape: tuple[int, ...] = ()
    """The shape of one entry."""

    def shape_of(self, rows: int, blocks: int) -> tuple[int, ...]:
        """The shape for a matrix of `rows` rows with `blocks` blocks each."""
        places = {"block": (rows, blocks), "row": (rows, 1), "tensor": ()}
        return (*places[self.per], *self.shape)


class Parts(ABC):
    """Named tensors: [..., G, *entry] with an entry per block, [..., 1, *entry] per row, [] for the whole tensor."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name. Those of the whole tensor are scalars."""

    @abstractmethod
    def with_tensors(self, tensors: dict[str, Tensor]) -> Parts:
        """Parts of the same kind and names with these tensors."""

    def split_rows(self, rows: list[int]) -> list[Parts]:
        """Split the parts of a matrix by these numbers of rows. Each piece keeps the scalars."""
        split = {
            name: [tensor] * len(rows) if tensor.dim() == 0 else list(tensor.split(rows))
            for name, tensor in self.tensors.items()
        }
        return [
            self.with_tensors({name: tensors[index] for name, tensors in split.items()}) for index in range(len(rows))
        ]

    def of_blocks(self, blocks: Tensor | slice) -> Parts:
        """The parts of some blocks, by their index in the row. Parts of a row or of the whole tensor stay."""
        return self.with_tensors(
            {
                name: tensor if tensor.dim() == 0 or tensor.shape[1] == 1 else tensor[:, blocks]
                for name, tensor in self.tensors.items()
            }
        )

    @staticmethod
    def side_by_side(parts: Sequence[Parts]) -> Parts:
        """Join the parts of matrices side by side. Scalars are taken from the first."""
        return Parts._together(parts, 1)

    @staticmethod
    def one_above_other(parts: Sequence[Parts]) -> Parts:
        """Join the parts of matrices one above the other. Scalars are taken from the first."""
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
    """The parts of a grid that has no class of its own for them."""

    named: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.named

    def with_tensors(self, tensors: dict[str, Tensor]) -> NamedParts:
        return NamedParts(tensors)
