"""The input transform that the linears of a site share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mxrot.layers.product import applied_matrices
from mxrot.transforms.site_transform import SiteTransform, applied_in_turn, by_stage, empty_tensors
from mxrot.transforms.stages import BlockDiagonalSpec, StageSpec, apply_matrices


def is_of_transform(name: str) -> bool:
    """True if a tensor of this name in a checkpoint belongs to an input transform."""
    return name.rpartition(".")[0].endswith("_input")


class _Applied(NamedTuple):
    """The matrices that were made from a stored tensor, and the facts that identify it."""

    stored: Tensor
    """Holds the tensor's memory, so that it is not reused."""
    place: int
    version: int
    matrices: Tensor


class InputTransform(nn.Module):
    """Holds the tensors of a site's stages, as a checkpoint does, and applies the stages.

    A block-diagonal stage at the end is `matrices`, for the code that quantizes its result. `lead` is all stages before
    it.
    """

    weight: nn.Parameter
    """sqrt(B) T of the last block-diagonal stage, if there is one, in bfloat16."""

    def __init__(self, specs: Sequence[StageSpec], stored: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.has_matrices = isinstance(self.specs[-1], BlockDiagonalSpec)
        """True if the quantizer applies the last stage."""
        self.has_lead = len(self.specs) > self.has_matrices
        for name, tensor in stored.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._applied: _Applied | None = None
        self.is_for_kernels = False
        """Keep the matrices row by row on a GPU. Otherwise kernels would copy them in every call."""
        self.prepared: Tensor | None
        """The bytes of `matrices()`, int16, for a compiled model. Not part of a checkpoint; moves with the module."""
        keep(self, "prepared", None)

    @staticmethod
    def of(transform: SiteTransform) -> InputTransform:
        """An input transform that applies `transform`, rounded as in a checkpoint."""
        return InputTransform(transform.specs, transform.stored())

    @staticmethod
    def empty(specs: Sequence[StageSpec], width: int, device: torch.device | str) -> InputTransform:
        """An input transform for `width` channels, without values."""
        return InputTransform(specs, empty_tensors(specs, width, device))

    def fill(self, transform: SiteTransform) -> None:
        """Take the tensors of a transform of the same shapes."""
        own = dict(self.named_parameters())
        for name, tensor in transform.stored().items():
            assert own[name].shape == tensor.shape, (name, own[name].shape, tensor.shape)
            own[name].data = tensor

    def lead(self, x: Tensor) -> Tensor:
        """`x` after all stages except the one of `matrices`, in the type of `x`.

        The stages are computed in float32 and rounded once. Autocast has no effect.
        """
        if not self.has_lead:
            return x
        if any(tensor.device.type == "meta" for tensor in self._lead_tensors()):  # as for `matrices`
            led: Tensor = self(x, only_lead=True)
            return led
        return self._led(x)

    def _lead_tensors(self) -> Iterator[Tensor]:
        return (tensor for name, tensor in self.named_parameters() if not (self.has_matrices and name == "weight"))

    def _led(self, x: Tensor) -> Tensor:
        # If a model is spread over devices, the linear that owns the transform may be on another device.
        stored = {name: tensor.to(x.device) for name, tensor in self.named_parameters()}
        parts = list(zip(self.specs, by_stage(self.specs, stored), strict=True))
        leading = parts[:-1] if self.has_matrices else parts
        with torch.autocast(x.device.type, enabled=False):
            return applied_in_turn([spec.stage(part) for spec, part in leading], x)

    def matrices(self) -> Tensor:
        """T as runtimes apply it, bfloat16 [1 | G, B, B], if it `has_matrices`. Cached until the stored tensor changes.

        A transform on the meta device is called as a module instead: if weights are offloaded, hooks load them during a
        call.
        """
        weight = self.weight
        if weight.device.type == "meta":
            found: Tensor = self()
            return found
        if weight.is_inference():  # an inference tensor does not count its changes
            return self._made()
        place, version, kept = weight.data_ptr(), weight._version, self._applied
        if kept is None or (kept.place, kept.version, kept.stored.device) != (place, version, weight.device):
            kept = self._applied = _Applied(weight.detach(), place, version, self._made())
        return kept.matrices

    @torch.no_grad()
    def _made(self) -> Tensor:
        applied = applied_matrices(self.weight)
        return applied.contiguous() if self.is_for_kernels and applied.is_cuda else applied

    @torch.no_grad()
    def prepare(self, is_for_kernels: bool = False) -> None:
        """Keep the matrices for a model that is compiled."""
        self.is_for_kernels, self._applied = is_for_kernels, None
        if self.has_matrices:
            keep(self, "prepared", self.matrices().view(torch.int16))

    def forward(self, x: Tensor | None = None, only_lead: bool = False) -> Tensor:
        """What linears see of x before it is quantized, float32. Without x, `matrices`. With `only_lead`, the result of
        `lead`."""
        if x is None:
            return self._made()
        led = self._led(x) if self.has_lead else x
        if only_lead:
            return led
        led = led.to(torch.float32)
        return apply_matrices(led, self.matrices().to(torch.float32)) if self.has_matrices else led

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._applied = None
        keep(self, "prepared", None)
        super()._load_from_state_dict(*arguments, **keywords)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputTransform:
        """For `model.to(...)`: the matrices move, and stay bfloat16."""
        self._applied = None
        super()._apply(keeping_type(fn), recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_applied": None}


def keeping_type(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`change` without its casts: codes would mean something else in another type."""

    def changed(tensor: Tensor) -> Tensor:
        found = change(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return changed


def keep(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Make `value` a buffer of a module that moves with it and is not part of a checkpoint.

    None becomes a persistent buffer instead: code that goes through the others (accelerate) expects a tensor in each.
    """
    if value is not None or module._buffers.get(name, module) is not None:
        module.register_buffer(name, value, persistent=value is None)
