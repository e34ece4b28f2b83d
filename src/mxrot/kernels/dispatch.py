"""The choice of the code that runs an operation on a device. No other module asks about devices and compilers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from mxrot.formats import BlockScales, Format, QTensor, ScaleRule, Uniform, get_format
from mxrot.formats.block_scales import E8M0
from mxrot.formats.element import Element, FloatElement, IntElement
from mxrot.kernels.chunked import packed_product_in_chunks, rotate_quantize_in_chunks
from mxrot.kernels.crossovers import crossovers_of
from mxrot.kernels.fixed_rows import has_invariant_rows, in_fixed_rows
from mxrot.kernels.linear import PATHS, Inputs, LookUpWeight, PackedWeight, by_look_up
from mxrot.kernels.plain import (
    ReachedColumns,
    RoundedColumns,
    WeightGradients,
    WeightMoves,
    count_parts,
    diagonal_blocks,
    moment_of_parts,
    plain_bfloat16_parts,
    plain_divergence,
    plain_moved_weights,
    plain_moved_weights_gradients,
    plain_rotate_quantize,
    plain_round_columns,
    plain_round_reached,
)
from mxrot.transforms.stages import apply_matrices


def rotate_quantize(x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule) -> Tensor:
    """Q(x T), in the shape of `x`: bfloat16 from the Triton kernel if it applies, otherwise float32.

    Matrices whose block size is not the format's are multiplied first, in float32.
    """
    x, left = _fused_or_applied(x, matrices, format)
    if x.is_cuda and has_triton() and _kernel_covers(x, format, rule):
        from mxrot.kernels.fused.rotate_quantize import rotate_quantize as fused

        return fused(x, left, format, rule, has_invariant_rows())
    is_in_chunks = x.device.type == "cpu" and _kernel_covers(x, format, rule)
    plain = rotate_quantize_in_chunks if is_in_chunks else plain_rotate_quantize
    return in_fixed_rows(lambda part: plain(part, left, format, rule), x)


def multiply(inputs: Tensor, weight: Tensor, are_exact_in_bfloat16: bool) -> Tensor:
    """inputs [..., K] @ weight [N, K]^T in float32. It runs on bfloat16 matrix hardware if both are exact in
    bfloat16."""
    return in_fixed_rows(lambda part: _multiply(part, weight, are_exact_in_bfloat16), inputs)


def _multiply(inputs: Tensor, weight: Tensor, are_exact_in_bfloat16: bool) -> Tensor:
    if inputs.is_cuda and are_exact_in_bfloat16:
        flat = inputs.to(torch.bfloat16).reshape(-1, inputs.shape[-1])
        product = torch.mm(flat, weight.to(torch.bfloat16).t(), out_dtype=torch.float32)
        return product.view(*inputs.shape[:-1], len(weight))
    return torch.nn.functional.linear(inputs.float(), weight.float())


def dequantize_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 weights [N, K] of packed codes uint8 [N, K/2] and E8M0 bytes [N, K/32]. The result is bfloat16 from the
    Triton kernel, otherwise float32, with the same numbers."""
    if codes.is_cuda and has_triton():
        from mxrot.kernels.fused.dequantize import dequantize

        return dequantize(codes, scales)
    format = get_format("mxfp4")
    return QTensor.dequantize_packed(codes, BlockScales(scales, format.scale), format)


def multiply_by_mxfp4(inputs: Tensor, codes: Tensor, scales: Tensor, are_exact_in_bfloat16: bool) -> Tensor:
    """inputs [..., K] times packed MXFP4 weights [N, K], which are dequantized first: float32 [..., N]."""
    if inputs.device.type == "cpu" and not has_invariant_rows():
        return packed_product_in_chunks(inputs, codes, scales)
    return multiply(inputs, dequantize_mxfp4(codes, scales), are_exact_in_bfloat16)


MOMENT_CHANNELS = 512
"""Channels per product on a GPU, which computes their whole second moment for its diagonal blocks."""


def second_moment(a: Tensor, b: Tensor, size: Tensor | None = None) -> Tensor:
    """a^T b, float64 [n, m], of [rows, n] and [rows, m]. Each row of both is multiplied by its `size` [rows, 1].

    Products and their sums are float32 on a CPU. On a GPU they are as in `kernels.plain.moments`.
    """
    if not a.is_cuda:
        left = a.float() if size is None else a * size
        right = left if b is a else b.float() if size is None else b * size
        return (left.t() @ right).double()
    if size is None and a.dtype == b.dtype != torch.float32:
        return moment_of_parts(a, b, a.shape[1], b.shape[1])
    left = bfloat16_parts(a, None if size is None else size.square())
    right = left if b is a and size is None else bfloat16_parts(b)
    return moment_of_parts(left, right, a.shape[1], b.shape[1])


def bfloat16_parts(x: Tensor, factors: Tensor | None = None) -> Tensor:
    """`x` [rows, K] in one or two bfloat16 parts, as `plain_bfloat16_parts` defines them."""
    if x.is_cuda and has_triton() and count_parts(x, factors is not None) == 2:
        from mxrot.kernels.fused.parts import two_bfloat16_parts

        return two_bfloat16_parts(x, factors)
    return plain_bfloat16_parts(x, factors)


def block_moments(x: Tensor, block: int) -> Tensor:
    """x_g^T x_g of each block of channels: float64 [K / B, B, B] of [rows, K]."""
    if not x.is_cuda:
        blocks = x.float().unflatten(1, (-1, block)).transpose(0, 1)
        return (blocks.transpose(1, 2) @ blocks).double()
    # With the unneeded blocks off the diagonal, matrix hardware is still faster than any way to compute small products.
    parts = [diagonal_blocks(second_moment(part, part), block) for part in x.split(MOMENT_CHANNELS, dim=1)]
    return torch.cat(parts)


def weight_parts(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 `weight` [N, K] in the form for `outputs` with inputs of `dtype`: [N, K], or [2 N, K] if one part is not
    enough.

    Synchronizes with the device.
    """
    if dtype == torch.float32 or weight.device.type == "cpu":
        return weight.to(torch.float32)
    first = weight.to(dtype)
    rest = (weight - first).to(dtype)
    return torch.cat([first, rest]) if rest.any() else first


def outputs(x: Tensor, parts: Tensor, rows: int) -> Tensor:
    """x W^T in float32, [tokens, N]. `parts` are the parts of W, with N `rows` each."""
    if x.is_cuda and x.dtype == parts.dtype != torch.float32:
        product = torch.mm(x, parts.t(), out_dtype=torch.float32)
    else:
        product = x.float() @ parts.float().t()
    return product if len(parts) == rows else product.unflatten(1, (-1, rows)).sum(dim=1)


FP8_OUTPUTS = 16
"""The number of outputs of an FP8 product must be a multiple of this (torch._scaled_mm)."""


@dataclass(frozen=True)
class Choice:
    """The path that computes a linear, and the reason."""

    path: str | None
    """A name in `linear.PATHS`. None: the plain path, which dequantizes the weights and multiplies."""
    reason: str


def choose_path(rows: int, weight: PackedWeight, device: torch.device) -> Choice:
    """The path that computes y = Q(x T) W_q^T for `rows` rows of x, with MXFP4 on both sides."""
    if device.type != "cuda":
        return Choice(None, f"{device.type} has no FP4 or FP8 products")
    if not has_triton():
        return Choice(None, "Triton is not installed")
    capability = torch.cuda.get_device_capability(device)
    if takes_block_scales(device) and weight.swizzled is not None:
        return Choice("block scales", "its matrix units take FP4 with block scales; not measured so far")
    limits = crossovers_of(device)
    if limits is None:
        return Choice(
            None,
            f"nothing was measured for compute capability {capability[0]}.{capability[1]}; "
            "`mxrot bench kernels --remember` does",
        )
    if weight.row_exponents is None:
        return Choice(None, "some block of the weights does not fit into E4M3, or they were not prepared")
    if has_invariant_rows():
        return Choice("fixed tiles", "a row must not depend on those beside it")
    most = limits.middle if weight.lifted is None else limits.middle_kept
    if limits.few < rows <= most and takes_middle_rows(rows, weight, device):
        return Choice("middle rows", f"{limits.few + 1} to {most} rows")
    limit = limits.packed if weight.lifted is None else limits.kept
    if rows <= limit:
        return Choice("matrix units", f"up to {limit} rows")
    if len(weight.codes) % FP8_OUTPUTS:
        return Choice(None, f"FP8 products make outputs in multiples of {FP8_OUTPUTS}")
    return Choice("fp8", f"more than {limit} rows")


def takes_middle_rows(rows: int, weight: PackedWeight, device: torch.device) -> bool:
    """True if there is a product for middle rows, and enough rows for it. Triton's product is slower than the one in
    CUDA."""
    from mxrot.kernels.cuda.middle import is_there

    is_hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)
    if weight.scales.shape[1] % 4 or not is_hopper:
        return False
    return is_there(device) or 16 < rows <= 128


def quantized_linear(inputs: Inputs, weight: PackedWeight) -> Tensor | None:
    """Q(x T) W_q^T in the type of x, if a kernel computes it. None if the plain path does."""
    if not _is_for_kernels(inputs):
        return None
    choice = choose_path(inputs.rows, weight, inputs.x.device)
    if choice.path is None:
        return None
    x, matrices = _fused_or_applied(inputs.x, inputs.matrices, inputs.format)
    if x is inputs.x:
        return PATHS[choice.path](inputs, weight)
    return PATHS[choice.path](replace(inputs, x=x, matrices=matrices), weight).to(inputs.x.dtype)


LOOK_UP_ROWS = 1024
"""With up to this many rows, 2-bit codes are looked up. With more, they are dequantized to float32."""


def choose_look_up(rows: int, weight: LookUpWeight, inputs: Format, device: torch.device) -> Choice:
    """The path that computes y = Q(x T) W_q^T for `rows` rows of x, with look-up weights."""
    if device.type != "cuda" or torch.version.hip is not None or not has_triton():
        return Choice(None, "weights are looked up on Nvidia's GPUs only, by Triton")
    if not (isinstance(inputs.grid, Uniform) and isinstance(inputs.element, IntElement) and inputs.block is None):
        return Choice(None, "inputs are not integers with one scale a row")
    if weight.group % 16:
        return Choice(None, f"a group of {weight.group} weights is not a multiple of 16")
    if rows > LOOK_UP_ROWS:
        return Choice(None, f"more than {LOOK_UP_ROWS} rows")
    if has_invariant_rows():
        return Choice(None, "a row must not depend on those beside it")
    return Choice("look-up", f"up to {LOOK_UP_ROWS} rows")


def look_up_linear(inputs: Inputs, weight: LookUpWeight) -> Tensor | None:
    """Q(x T) W_q^T in the type of x, if a kernel looks the weights up. None if the plain path computes it."""
    if choose_look_up(inputs.rows, weight, inputs.format, inputs.x.device).path is None:
        return None
    x, matrices = inputs.x, inputs.matrices
    if matrices is not None:
        x = apply_matrices(x.to(torch.float32), matrices.to(torch.float32))
    return by_look_up(replace(inputs, x=x, matrices=None), weight).to(inputs.x.dtype)


def _fused_or_applied(x: Tensor, matrices: Tensor | None, format: Format) -> tuple[Tensor, Tensor | None]:
    """The input and the matrices that remain to be applied. Matrices of other blocks than the kernels' are applied
    here."""
    if matrices is None or matrices.shape[-1] == format.block:
        return x, matrices
    applied = matrices.to(torch.float32)
    return in_fixed_rows(lambda part: apply_matrices(part.to(torch.float32), applied), x), None


def _is_for_kernels(inputs: Inputs) -> bool:
    return inputs.format.name == "mxfp4" and _kernel_covers(inputs.x, inputs.format, inputs.rule)


def round_columns(
    columns: Tensor, scales: Tensor, upper: Tensor, zeros: Tensor | None, element: Element
) -> RoundedColumns:
    """GPTQ over one block of columns, as `plain_round_columns` defines it."""
    width = columns.shape[1]
    if columns.is_cuda and has_triton() and zeros is None and isinstance(element, FloatElement) and width in (16, 32):
        from mxrot.kernels.fused.round_columns import round_columns as fused

        return fused(columns, scales, upper, element)
    return plain_round_columns(columns, scales, upper, zeros, element)


def round_reached(
    columns: Tensor,
    upper: Tensor,
    format: Format,
    rule: ScaleRule,
    offsets: tuple[int, ...],
    reciprocals: Tensor,
    into: tuple[Tensor, Tensor],
) -> ReachedColumns:
    """GPTQ over one block of columns, scales included, as `plain_round_reached` defines it.

    `reciprocals` [B] are those of the diagonal of `upper`. Values and differences [N, B] are written to the tensors
    `into`.
    """
    if columns.is_cuda and has_triton() and _rounds_reached_on_gpu(format, rule, offsets):
        from mxrot.kernels.fused.round_reached import round_reached as fused

        return fused(columns, upper, format, rule, offsets, reciprocals, into)
    found = plain_round_reached(columns, upper, format, rule, offsets, round_columns)
    into[0].copy_(found.values)
    into[1].copy_(found.differences)
    return found


def moved_weights(offset: Tensor, moves: WeightMoves, element: Element) -> Tensor:
    """Tunable weights for these offsets, as `plain_moved_weights` defines them."""
    if _moves_on_gpu(offset, moves, element):
        from mxrot.kernels.fused.moved_weights import moved_weights as fused

        return fused(offset, moves, element)  # type: ignore[arg-type]
    return plain_moved_weights(offset, moves, element)


def moved_weights_gradients(
    gradient: Tensor, offset: Tensor, moves: WeightMoves, element: Element, wants_exponent: bool
) -> WeightGradients:
    """Gradients of what moves tunable weights, as `plain_moved_weights_gradients` defines them."""
    if _moves_on_gpu(offset, moves, element):
        from mxrot.kernels.fused.moved_weights import moved_weights_gradients as fused

        return fused(gradient, offset, moves, element, wants_exponent)  # type: ignore[arg-type]
    return plain_moved_weights_gradients(gradient, offset, moves, element, wants_exponent)


def divergence(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL(expected || found) of each row of logits, and its gradient, as `plain_divergence` defines them."""
    if found.is_cuda and has_triton() and expected.stride(-1) == found.stride(-1) == 1:
        from mxrot.kernels.fused.divergence import divergence as fused

        return fused(expected, found)
    return plain_divergence(expected, found)


def _moves_on_gpu(offset: Tensor, moves: WeightMoves, element: Element) -> bool:
    blocks = 32 * moves.scales.shape[1] == offset.shape[1]
    fits = moves.follow is None or moves.follow.shape[-1] == 32
    return offset.is_cuda and has_triton() and isinstance(element, FloatElement) and blocks and fits


def _rounds_reached_on_gpu(format: Format, rule: ScaleRule, offsets: tuple[int, ...]) -> bool:
    fits = isinstance(format.element, FloatElement) and format.block in (16, 32) and len(offsets) <= 4
    return fits and format.scale == E8M0 and rule.raises_from is not None


def _kernel_covers(x: Tensor, format: Format, rule: ScaleRule) -> bool:
    if not isinstance(format.grid, Uniform):
        return False
    element = format.element
    fits = isinstance(element, FloatElement) and element.mantissa_bits < 8 and format.block == 32
    return fits and rule.raises_from is not None and x.dtype in (torch.float16, torch.bfloat16, torch.float32)


def takes_block_scales(device: torch.device) -> bool:
    """True if this device has matrix units for FP4 with a scale for each block."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


@cache
def has_triton() -> bool:
    """True if Triton kernels can be compiled on this machine."""
    return importlib.util.find_spec("triton") is not None
