"""The quantized linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.formats import QTensor, TensorQuantizer
from mxrot.formats.quantizer import PART
from mxrot.kernels import Choice, choose_look_up, choose_path
from mxrot.layers.prepare import is_in_one_place, prepare_site
from mxrot.layers.product import StoredWeight, product, quantized_input, traced_product
from mxrot.layers.site import PREPARED, SiteLinear, SiteProducts, lies_apart, prepared_of
from mxrot.layers.transform import InputTransform, keep, keeping_type


class QuantLinear(SiteLinear):
    """y = Q(x T) W_q^T + b. W_q is stored as packed codes and their parts: `weight_packed` and `weight_<part>`.

    The first linear of a site owns the transform as a submodule with its checkpoint name. The others refer to it.
    """

    site: SiteProducts[QuantLinear] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weights: TensorQuantizer,
        activations: TensorQuantizer | None,
        bias: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weights, self.activations = weights, activations
        for name, (shape, dtype) in weights.stored_parts(out_features, in_features).items():
            empty = torch.zeros(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        # Set by `prepare_site`. It moves with the module and is not part of a checkpoint.
        for name in PREPARED:
            keep(self, name, None)
        self.keeps_lifted = None
        self.site = None
        self.fast = False
        """Sum FP8 products in fewer bits, if they are used."""
        self._transform: tuple[InputTransform, ...] = ()
        self.remainder: Tensor | None = None
        """The rounding remainder of each weight, bfloat16 [out_features, in_features]. Kept only for tuning."""

    def own_transform(self, scheme: str, transform: InputTransform) -> None:
        """Register the site's transform here, with its name in a checkpoint."""
        self.add_module(f"{scheme}_input", transform)
        self.share_transform(transform)

    def share_transform(self, transform: InputTransform) -> None:
        """Apply a transform that another linear of the site owns."""
        self._transform = (transform,)  # in a tuple, so that it is not registered twice

    @property
    def transform(self) -> InputTransform | None:
        return self._transform[0] if self._transform else None

    @torch.no_grad()
    def set_weight(self, weight: QTensor) -> None:
        """Take over the codes [out_features, in_features] and their parts. ValueError if they have another rule."""
        tensors = weight.parts.tensors
        if weight.format != self.weights.format or tuple(tensors) != self.weights.part_names:
            raise ValueError(f"expected {self.weights.spelled} with {self.weights.part_names}, got {tuple(tensors)}")
        self.forget()
        self.weight_packed.data = weight.packed()
        for name, kept in zip(self.weights.part_names, self.stored_weight().parts, strict=True):
            kept.data = tensors[name]

    @property
    def together(self) -> Sequence[QuantLinear]:
        """The linears that are computed together with this one, including it."""
        return (self,) if self.site is None else self.site.linears

    def forget(self) -> None:
        """Drop what was prepared, here and in the other linears of the site."""
        if self.site is not None:
            self.site.forget()
        for linear in self.together:
            linear.keeps_lifted = None
            for name in PREPARED:
                keep(linear, name, None)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*arguments, **keywords)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """For `model.to(...)`: codes and scales keep their types, a bias does not.

        On a new device a prepared site is prepared again, once all its linears are there.
        """
        moves = fn(self.weight_packed.new_empty(0)).device != self.weight_packed.device
        if moves:
            for name in PREPARED:
                keep(self, name, None)
        moved, bias = keeping_type(fn), self.bias
        super()._apply(lambda tensor: fn(tensor) if _is_of(tensor, bias) else moved(tensor), recurse)
        if self.keeps_lifted is not None and (moves or lies_apart(self)) and is_in_one_place(self.together):
            prepare_site(self.together, self.keeps_lifted)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.site is not None:
            self.site.join()

    def stored_weight(self) -> StoredWeight:
        """The codes and their parts, without what was prepared."""
        return StoredWeight(self.weight_packed, tuple(getattr(self, PART + name) for name in self.weights.part_names))

    def qtensor(self) -> QTensor:
        """The weight as a QTensor of codes and their parts."""
        stored = self.stored_weight()
        return QTensor.from_packed(stored.codes, self.weights.as_parts(stored.parts), self.weights.format)

    def dequantized_weight(self) -> Tensor:
        """W_q in float32, [out_features, in_features]."""
        return self.stored_weight().dequantized(self.weights)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Q(x T), in the shape of `x`. The type is float32, or bfloat16 if that is exact."""
        return quantized_input(self._led(x), self._matrices(x.device), self.activations)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of `x`. Sums are in float32."""
        found = None if self.site is None else self.site.take(self, x)
        return self.compute(x, self._own_weight(), self.bias) if found is None else found

    def compute(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        """Q(x T) W_q^T + b with a weight in the format of this linear.

        The gradients are those of `layers.product.traced_product`, and of the leading stages of the transform.
        """
        x = self._led(x)
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            stored, applied = self._traced_transform(x.device)
            return traced_product(x, stored, applied, weight, bias, self.weights, self.activations, self.fast)
        return product(x, self._matrices(x.device), weight, bias, self.weights, self.activations, self.fast)

    def _traced_transform(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The stored transform, and the bytes of its matrices if they are available."""
        transform = self.transform
        if transform is None or not transform.has_matrices:
            return None, None
        if torch.compiler.is_compiling() and transform.weight.device == device:
            return transform.weight, transform.prepared
        matrices = self._matrices(device)
        return (None, None) if matrices is None else (matrices, matrices.view(torch.int16))

    def _own_weight(self) -> StoredWeight:
        """The weight with what was prepared, unless that is for the whole site."""
        own = self.stored_weight()
        return own if self.whole_codes is not None else StoredWeight(own.codes, own.parts, prepared_of(self))

    def _led(self, x: Tensor) -> Tensor:
        """`x` after the leading stages of the transform, which are applied before the quantizer."""
        return x if self.transform is None else self.transform.lead(x)

    def _matrices(self, device: torch.device) -> Tensor | None:
        if self.transform is None or not self.transform.has_matrices:
            return None
        matrices = self.transform.matrices()
        # If a model is spread over devices, the linear that owns the transform may be on another device.
        return matrices if matrices.device == device else matrices.to(device)

    def choose_path(self, rows: int) -> Choice:
        """The way to compute this linear for `rows` rows of input, and why."""
        if self.activations is not None and self.weights.looks_up:
            weight = self.stored_weight().looked_up()
            return choose_look_up(rows, weight, self.activations.format, self.weight_packed.device)
        if self.activations is None or not (self.weights.is_mxfp4 and self.activations.is_mxfp4):
            return Choice(None, "weights and inputs are not both MXFP4")
        if self.activations.rule.is_clipped:
            return Choice(None, "inputs are clipped, which kernels do not do")
        return choose_path(rows, self.site_weight().packed(), self.weight_packed.device)

    def site_weight(self) -> StoredWeight:
        """The weight that is multiplied when this linear is called. It is the weight of the whole site if that was
        prepared."""
        return self._own_weight() if self.site is None else self.site.weight_of(self)

    def extra_repr(self) -> str:
        inputs = "unquantized" if self.activations is None else self.activations.format.name
        return f"{self.in_features}, {self.out_features}, weights={self.weights.format.name}, inputs={inputs}"


def _is_of(tensor: Tensor, parameter: Tensor | None) -> bool:
    """True if the tensor is this parameter or its gradient."""
    return parameter is not None and (tensor is parameter or tensor is parameter.grad)
