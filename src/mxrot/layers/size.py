"""The size of a model in bytes, by purpose."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from mxrot.formats.quantizer import PACKED, PART
from mxrot.layers.transform import is_of_transform


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model's tensors. Sizes of parts add up."""

    quantized_weights: int = 0
    """The number of weights that are held as codes."""
    code_bytes: int = 0
    scale_bytes: int = 0
    transform_bytes: int = 0
    other_bytes: int = 0
    """Embeddings, norms, heads, and linears that are not quantized."""
    left_weights: int = 0
    """The number of weights of linears of decoder blocks that are not quantized."""
    left_bytes: int = 0
    """The bytes of these weights, a part of `other_bytes`."""
    head_bytes: int = 0
    """The bytes of a quantized head with its scales and its transform, also a part of `other_bytes`."""

    @staticmethod
    def of(
        tensors: Mapping[str, Tensor],
        quantized_weights: int,
        other_itemsize: int | None = None,
        left: Collection[str] = (),
        head: str = "",
    ) -> ModelSize:
        """The size of named tensors, as a checkpoint names them. They hold `quantized_weights` weights as codes. Shared
        storage counts once.

        Tensors that are not quantized count `other_itemsize` bytes per element; None stands for their current size.
        `left` are the names of weights of linears that are not quantized. `head` is the name of the head if that is
        quantized.
        """
        counts = {"codes": 0, "scales": 0, "transforms": 0, "other": 0}
        left_weights = left_bytes = head_bytes = 0
        seen = set()
        for name, tensor in tensors.items():
            place = (tensor.data_ptr(), tensor.device, tensor.numel())
            if place in seen and tensor.numel():
                continue
            seen.add(place)
            kind = _kind(name)
            itemsize = other_itemsize if kind == "other" and other_itemsize else tensor.element_size()
            is_of_head = bool(head) and name.startswith(f"{head}.")
            counts["other" if is_of_head else kind] += tensor.numel() * itemsize
            if is_of_head:
                head_bytes += tensor.numel() * itemsize
            if name in left:
                left_weights += tensor.numel()
                left_bytes += tensor.numel() * itemsize
        parts = counts["codes"], counts["scales"], counts["transforms"], counts["other"]
        return ModelSize(quantized_weights, *parts, left_weights, left_bytes, head_bytes)

    def as_table(self) -> dict[str, int]:
        """The table for a record. It has no entry for a head that is not quantized."""
        return {name: value for name, value in vars(self).items() if name != "head_bytes" or value}

    def __add__(self, other: ModelSize) -> ModelSize:
        return ModelSize(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: int) -> ModelSize:
        return ModelSize(*(times * value for value in vars(self).values()))

    @property
    def total_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes + self.transform_bytes + self.other_bytes

    @property
    def bits_per_weight(self) -> float | None:
        """The mean bits per weight over the linears of the decoder blocks, with those that are not quantized. None if
        nothing is quantized.

        Codes and scales count, transforms do not.
        """
        if not self.quantized_weights:
            return None
        return 8 * (self.code_bytes + self.scale_bytes + self.left_bytes) / self._linear_weights

    @property
    def transform_bits_per_weight(self) -> float | None:
        """Bits of transforms per weight, over the same weights."""
        return 8 * self.transform_bytes / self._linear_weights if self.quantized_weights else None

    @property
    def _linear_weights(self) -> int:
        return self.quantized_weights + self.left_weights


def _kind(name: str) -> str:
    if is_of_transform(name):  # tested first: a tensor of a stage may have the name of a part
        return "transforms"
    last = name.rpartition(".")[2]
    if last.startswith(PART):
        return "codes" if last == PACKED else "scales"
    return "other"
