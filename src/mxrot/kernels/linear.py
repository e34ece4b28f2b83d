"""Paths that compute y = Q(x T) W_q^T with MXFP4 on both sides. `dispatch` chooses among them.

Each path takes the packed weights as a checkpoint holds them, and says where it runs. All compute the same sums of
exact products. They differ in the order and the precision of the sums. Paths with E5M2 inputs clamp scales of inputs
beyond `plain.E5M2_EXPONENTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mxrot.formats import Format, ScaleRule
from mxrot.kernels import scale_counts
from mxrot.kernels.fixed_rows import has_invariant_rows
from mxrot.kernels.fp8 import fp8_product


@dataclass(frozen=True)
class PackedWeight:
    """Weights in MXFP4, and what a path has computed from them once."""

    codes: Tensor
    """Two codes per byte, uint8 [N, K/2]."""
    scales: Tensor
    """E8M0 bytes, uint8 [N, K/32]."""
    row_exponents: Tensor | None = None
    """Exponents for lifting to E4M3 without an error, int32 [N]. None if some block does not fit, or if this was not
    checked."""
    lifted_scales: Tensor | None = None
    """2^row_exponents, float32 [N], or [] if all are the same."""
    lifted: Tensor | None = None
    """E4M3 [N, K], if memory is given for speed."""
    swizzled: Tensor | None = None
    """A copy of the scales in the order of `plain.swizzle_scales`, uint8, for hardware that reads block scales."""


@dataclass(frozen=True)
class LookUpWeight:
    """Weights whose 2-bit codes are looked up in four levels per group."""

    packed: Tensor
    """Four codes per byte, uint8 [N, K/4]."""
    scales: Tensor
    """float16 [N, G]."""
    levels: Tensor
    """int8 [N, G, 4]."""

    @property
    def group(self) -> int:
        return 4 * self.packed.shape[1] // max(1, self.scales.shape[1])


@dataclass(frozen=True)
class Inputs:
    """The input of a linear, its transform and its quantizer."""

    x: Tensor
    """[..., K] in fp16, bf16 or fp32."""
    matrices: Tensor | None
    """[1 | K/32, 32, 32] bfloat16; None for no transform."""
    format: Format
    rule: ScaleRule
    fast: bool = False
    """Sum FP8 products in fewer bits."""

    @property
    def rows(self) -> int:
        return self.x.numel() // max(1, self.x.shape[-1])


def _count_scales(inputs: Inputs) -> None:
    """Count the scales that E5M2 cannot represent."""
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_packed

    scale_counts.add(rotate_quantize_packed(inputs.x, inputs.matrices, inputs.format, inputs.rule))


def by_matrix_units(inputs: Inputs, weight: PackedWeight) -> Tensor:
    """Few rows: weights are read packed (Triton)."""
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2
    from mxrot.kernels.fused.skinny import skinny_product

    assert weight.row_exponents is not None
    if scale_counts.IS_COUNTING:
        _count_scales(inputs)
    x = rotate_quantize_e5m2(inputs.x, inputs.matrices, inputs.format, inputs.rule, are_in_pairs=True)
    return skinny_product(x, weight.codes, weight.scales, weight.row_exponents, inputs.x.dtype)


def by_middle_rows(inputs: Inputs, weight: PackedWeight) -> Tensor:
    """Middle rows: weights are read packed and multiplied as FP8 (CUDA C++; Triton if that cannot be compiled)."""
    from mxrot.kernels.cuda import middle as cuda
    from mxrot.kernels.fused import middle as fused
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2

    assert weight.row_exponents is not None
    if scale_counts.IS_COUNTING:
        _count_scales(inputs)
    x = rotate_quantize_e5m2(inputs.x, inputs.matrices, inputs.format, inputs.rule, are_across_blocks=True)
    product = cuda.middle_product if cuda.is_there(x.device) else fused.middle_product
    return product(x, weight.codes, weight.scales, weight.row_exponents, inputs.x.dtype)


def by_fixed_tiles(inputs: Inputs, weight: PackedWeight) -> Tensor:
    """Any number of rows, each with the bits that it has alone. Weights are read packed, and one program sums over all
    of K (CUDA C++ on Hopper; Triton elsewhere, and if K is not a multiple of 128)."""
    from mxrot.kernels.cuda import middle as cuda
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2
    from mxrot.kernels.fused.skinny import fixed_product

    assert weight.row_exponents is not None
    if scale_counts.IS_COUNTING:
        _count_scales(inputs)
    arguments = weight.codes, weight.scales, weight.row_exponents, inputs.x.dtype
    is_middle = weight.scales.shape[1] % 4 == 0 and cuda.is_there(inputs.x.device)
    x = rotate_quantize_e5m2(
        inputs.x,
        inputs.matrices,
        inputs.format,
        inputs.rule,
        are_in_pairs=not is_middle,
        are_across_blocks=is_middle,
        has_fixed_tile=True,
    )
    return cuda.middle_product(x, *arguments, are_whole=True) if is_middle else fixed_product(x, *arguments)


def by_fp8(inputs: Inputs, weight: PackedWeight) -> Tensor:
    """Many rows: one FP8 product, with weights that are kept in FP8 or lifted on the fly."""
    from mxrot.kernels.fused.lift import lift_weights
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2

    assert weight.row_exponents is not None and weight.lifted_scales is not None
    if scale_counts.IS_COUNTING:
        _count_scales(inputs)
    x = rotate_quantize_e5m2(inputs.x, inputs.matrices, inputs.format, inputs.rule)
    lifted = weight.lifted
    if lifted is None:
        lifted = lift_weights(weight.codes, weight.scales, weight.row_exponents)
    return fp8_product(x, lifted, weight.lifted_scales, inputs.x.dtype, inputs.fast)


def by_block_scales(inputs: Inputs, weight: PackedWeight) -> Tensor:
    """Any number of rows, on FP4 matrix hardware that applies the scales of both sides (Triton)."""
    from mxrot.kernels.fused.block_scaled import block_scaled_product
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_packed

    assert weight.swizzled is not None
    packed = rotate_quantize_packed(
        inputs.x, inputs.matrices, inputs.format, inputs.rule, swizzled=True, has_fixed_tile=has_invariant_rows()
    )
    return block_scaled_product(packed, weight.codes, weight.swizzled, inputs.x.dtype)


def by_look_up(inputs: Inputs, weight: LookUpWeight) -> Tensor:
    """Few rows of integers: weights are read packed (Triton). The matrices are not applied."""
    from mxrot.kernels.fused.look_up import look_up_product
    from mxrot.kernels.fused.quantize_rows import quantize_rows

    rows = quantize_rows(inputs.x, inputs.format, inputs.rule)
    return look_up_product(rows, weight.packed, weight.scales, weight.levels, inputs.x.dtype)


PATHS: dict[str, Callable[[Inputs, PackedWeight], Tensor]] = {
    "matrix units": by_matrix_units,
    "middle rows": by_middle_rows,
    "fixed tiles": by_fixed_tiles,
    "fp8": by_fp8,
    "block scales": by_block_scales,
}
