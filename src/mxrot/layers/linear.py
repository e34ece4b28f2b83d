"""The quantized linear, and the input transform that the linears of a site share.

The plain path is the definition that faster kernels must reproduce: the transform in float32, the activation
quantizer on its float32 result, then the product of the quantized input with the dequantized weights.
Where both operands are exact in bfloat16 the product runs on bfloat16 matrix hardware with a float32 result,
otherwise in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxrot.formats import BlockScales, Format, QTensor, ScaleRule, fake_quantize
from mxrot.kernels import Choice, Inputs, PackedWeight, choose_path, multiply, quantized_linear, rotate_quantize
from mxrot.kernels.plain import lift_exponents, plain_lift_weights
from mxrot.transforms.base import STORED_DTYPE, BlockTransform, apply_matrices


@dataclass(frozen=True)
class TensorQuantizer:
    """A format and the rule that picks its scales."""

    format: Format
    rule: ScaleRule

    def __call__(self, x: Tensor) -> Tensor:
        """What the quantized tensor stands for, float32."""
        return fake_quantize(x, self.format, self.rule)

    @property
    def is_exact_in_bfloat16(self) -> bool:
        """Is every quantized value a bfloat16 number?"""
        return self.rule.is_power_of_two and self.format.element.mantissa_bits < 8


class InputTransform(nn.Module):
    """Holds sqrt(B) T in bfloat16, as a checkpoint does, and applies T."""

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(stored, requires_grad=False)
        self._applied: tuple[object, Tensor] | None = None

    def matrices(self) -> Tensor:
        """T as runtimes apply it, bfloat16 [1 | G, B, B]; kept until the stored tensor changes."""
        stored = (self.weight.data_ptr(), self.weight._version, self.weight.device)
        if self._applied is None or self._applied[0] != stored:
            self._applied = (stored, BlockTransform.from_stored(self.weight).matrices.to(STORED_DTYPE))
        return self._applied[1]

    def forward(self, x: Tensor) -> Tensor:
        """x T in float32, blocks along the last dimension."""
        return apply_matrices(x.to(torch.float32), self.matrices().to(torch.float32))


class QuantLinear(nn.Module):
    """y = Q(x T) W_q^T + b with W_q kept as packed codes and scales.

    The first linear of a site owns the transform as a submodule under its checkpoint name; the others refer to it.
    """

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
        format = weights.format
        packed = torch.zeros(out_features, in_features * format.element.bits // 8, dtype=torch.uint8, device=device)
        scale_dtype = weights.rule.stored_type(format.scale).dtype
        scales = torch.zeros(out_features, in_features // format.block, dtype=scale_dtype, device=device)
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        self.weight_tensor_scale: nn.Parameter | None = None
        self.weight_zero_point: nn.Parameter | None = None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.row_exponents: Tensor | None
        self.lifted: Tensor | None
        # What `prepare` makes; moves with the module and is no part of a checkpoint.
        self.register_buffer("row_exponents", None, persistent=False)
        self.register_buffer("lifted", None, persistent=False)
        self._transform: tuple[InputTransform, ...] = ()
        self.remainder: Tensor | None = None
        """What rounding took away from each weight, bfloat16 [out_features, in_features]; kept only for tuning."""

    def own_transform(self, scheme: str, transform: InputTransform) -> None:
        """Register the site's transform here, under the name it has in a checkpoint."""
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
        """Take over codes and scales [out_features, in_features]."""
        self.row_exponents = self.lifted = None
        self.weight_packed.data = weight.packed()
        self.weight_scale.data = weight.scales.stored
        if weight.scales.tensor_scale is not None:
            self.weight_tensor_scale = nn.Parameter(weight.scales.tensor_scale, requires_grad=False)
        if weight.scales.zero_points is not None:
            self.weight_zero_point = nn.Parameter(weight.scales.zero_points, requires_grad=False)

    @property
    def _scales(self) -> BlockScales:
        stored_type = self.weights.rule.stored_type(self.weights.format.scale)
        return BlockScales(self.weight_scale, stored_type, self.weight_tensor_scale, self.weight_zero_point)

    def qtensor(self) -> QTensor:
        """The weight as codes and scales."""
        return QTensor.from_packed(self.weight_packed, self._scales, self.weights.format)

    def dequantized_weight(self) -> Tensor:
        """W_q in float32, [out_features, in_features]."""
        return QTensor.dequantize_packed(self.weight_packed, self._scales, self.weights.format)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Q(x T), the shape of `x`; float32, or bfloat16 where that holds it exactly."""
        if self.activations is None:
            return x.to(torch.float32) if self.transform is None else self.transform(x)
        matrices = None if self.transform is None else self.transform.matrices()
        return rotate_quantize(x, matrices, self.activations.format, self.activations.rule)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of `x`; sums in float32."""
        product = self._by_kernels(x)
        if product is None:
            product = multiply(self.quantized_input(x), self.dequantized_weight(), self._runs_in_bfloat16)
        if self.bias is not None:
            product = product + self.bias.to(torch.float32)
        return product.to(x.dtype)

    def packed(self) -> PackedWeight:
        """The weight as the kernels take it; for MXFP4."""
        lifted = None if self.lifted is None else self.lifted.view(torch.float8_e4m3fn)
        return PackedWeight(self.weight_packed, self.weight_scale, self.row_exponents, lifted)

    def _by_kernels(self, x: Tensor) -> Tensor | None:
        """x W^T without the bias from a kernel that reads the codes; None where there is none for this linear."""
        if self.activations is None or not self._is_mxfp4_on_both_sides:
            return None
        matrices = None if self.transform is None else self.transform.matrices()
        return quantized_linear(Inputs(x, matrices, self.activations.format, self.activations.rule), self.packed())

    def choose_path(self, rows: int) -> Choice:
        """What computes this linear for so many rows of input, and why."""
        if not self._is_mxfp4_on_both_sides:
            return Choice(None, "weights and inputs are not both MXFP4")
        return choose_path(rows, self.packed(), self.weight_packed.device)

    @property
    def _is_mxfp4_on_both_sides(self) -> bool:
        return self.activations is not None and self._is_mxfp4(self.weights) and self._is_mxfp4(self.activations)

    @staticmethod
    def _is_mxfp4(quantizer: TensorQuantizer) -> bool:
        return quantizer.format.name == "mxfp4" and quantizer.rule.is_power_of_two

    @torch.no_grad()
    def prepare(self, keeps_lifted: bool = False) -> None:
        """Look whether the weight can be lifted to FP8; with `keeps_lifted` do it, and keep a byte a weight more."""
        self.row_exponents = self.lifted = None
        if self._is_mxfp4(self.weights):
            exponents, outside = lift_exponents(self.weight_packed, self.weight_scale)
            if not int(outside):
                self.row_exponents = exponents
                if keeps_lifted:
                    # As bytes: a cast of the module would cast it too.
                    self.lifted = plain_lift_weights(self.weight_packed, self.weight_scale, exponents).view(torch.uint8)

    @property
    def _runs_in_bfloat16(self) -> bool:
        if self.activations is None:
            return False
        return self.weights.is_exact_in_bfloat16 and self.activations.is_exact_in_bfloat16

    def extra_repr(self) -> str:
        inputs = "unquantized" if self.activations is None else self.activations.format.name
        return f"{self.in_features}, {self.out_features}, weights={self.weights.format.name}, inputs={inputs}"


def prepare_linears(model: nn.Module, keeps_lifted: bool = False) -> None:
    """`QuantLinear.prepare` for all of a model."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare(keeps_lifted)
