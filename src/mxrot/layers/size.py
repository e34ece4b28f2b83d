"""What a model weighs, by what the bytes are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_CODES = (".weight_packed",)
_SCALES = (".weight_scale", ".weight_zero_point", ".weight_tensor_scale")


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model's tensors; sizes of parts add up."""

    quantized_weights: int = 0
    """Number of weights that are held as codes."""
    code_bytes: int = 0
    scale_bytes: int = 0
    transform_bytes: int = 0
    other_bytes: int = 0
    """Embeddings, norms, heads, and linears that were left alone."""

    @staticmethod
    def of(tensors: Mapping[str, Tensor], code_bits: int = 4, other_itemsize: int | None = None) -> ModelSize:
        """The size of named tensors, as a checkpoint names them; shared storage counts once.

        What is not quantized counts `other_itemsize` bytes an element; None stands for what it takes now.
        """
        counts = {"codes": 0, "scales": 0, "transforms": 0, "other": 0}
        seen = set()
        for name, tensor in tensors.items():
            place = (tensor.data_ptr(), tensor.device, tensor.numel())
            if place in seen and tensor.numel():
                continue
            seen.add(place)
            kind = _kind(name)
            itemsize = other_itemsize if kind == "other" and other_itemsize else tensor.element_size()
            counts[kind] += tensor.numel() * itemsize
        weights = counts["codes"] * 8 // code_bits
        return ModelSize(weights, counts["codes"], counts["scales"], counts["transforms"], counts["other"])

    def __add__(self, other: ModelSize) -> ModelSize:
        return ModelSize(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def total_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes + self.transform_bytes + self.other_bytes

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of codes and scales a quantized weight, transforms not counted; None if nothing is quantized."""
        if not self.quantized_weights:
            return None
        return 8 * (self.code_bytes + self.scale_bytes) / self.quantized_weights

    @property
    def transform_bits_per_weight(self) -> float | None:
        """Bits of transforms a quantized weight."""
        return 8 * self.transform_bytes / self.quantized_weights if self.quantized_weights else None


def _kind(name: str) -> str:
    if name.endswith(_CODES):
        return "codes"
    if name.endswith(_SCALES):
        return "scales"
    return "transforms" if name.endswith("_input.weight") else "other"
