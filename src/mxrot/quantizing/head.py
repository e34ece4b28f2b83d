"""The head as a quantized linear: its weights are rounded to nearest, some rows at a time, after everything else.

It is the head of the model after the rotations of its recipe. Blocks are calibrated and tuned with the unquantized
head, so they do not depend on its rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.errors import ConfigError
from mxrot.formats import QTensor, quantize
from mxrot.formats.block import ENCODED_ELEMENTS
from mxrot.formats.quantizer import PACKED, PART
from mxrot.models import Family, fill
from mxrot.quantizing.finite import check_rounded
from mxrot.quantizing.part import BlockRun
from mxrot.quantizing.record import LinearReport
from mxrot.quantizing.rounded import error_ratio
from mxrot.recipe import Recipe
from mxrot.scheme import SiteScheme, install_head
from mxrot.sections import HEAD_BLOCK
from mxrot.transforms import SiteTransform
from mxrot.transforms.orders import hadamard_matrix
from mxrot.transforms.stages import BlockDiagonal

SITE = "head"
"""The name of the head in a report, and of its transform in a checkpoint."""


class QuantizedHead(NamedTuple):
    """The head as a checkpoint stores it."""

    tensors: dict[str, Tensor]
    """By their names in the checkpoint, bias included; on the CPU."""
    report: LinearReport


def head_problems(model: PreTrainedModel, family: Family, recipe: Recipe) -> Iterator[ConfigError]:
    """The reasons why the head of a model cannot be quantized, if `recipe` quantizes it."""
    if recipe.head is None:
        return
    if family.beside is not None:
        yield ConfigError(
            f"recipe {recipe.name}: head: in family {family.name}, a model of more than text, the head stays as it is; "
            "leave out the table [head]"
        )
        return
    head = model.get_submodule(family.head)
    if isinstance(head, nn.Linear) and head.in_features % HEAD_BLOCK:
        yield ConfigError(
            f"{family.head}: in_features {head.in_features} is not a multiple of the block size {HEAD_BLOCK}; leave "
            "out the table [head]"
        )


def quantized_head(run: BlockRun, outer: dict[str, Tensor]) -> QuantizedHead | None:
    """The quantized head, from the tensors outside of the decoder blocks by full name. None if it is not quantized.

    Raises as `rounded_head`.
    """
    return None if run.scheme.head is None else rounded_head(run.scheme.head, run.family.head, outer, run.device)


def rounded_head(
    scheme: SiteScheme, name: str, outer: dict[str, Tensor], device: torch.device | str = "cpu"
) -> QuantizedHead:
    """Quantize the head called `name`, with weight and bias in `outer`, by a scheme; computed on `device` in float64.

    NumericsError, with the name, if a weight is NaN or Inf.
    """
    weight = outer[f"{name}.weight"]
    rows, width = weight.shape
    transform = None
    if scheme.stages:
        matrix = hadamard_matrix(HEAD_BLOCK).to(device)[None]
        transform = SiteTransform.of(BlockDiagonal(matrix)).as_applied()
    pieces, lost, norms = [], [], []
    for part in weight.split(max(1, ENCODED_ELEMENTS // width)):
        wanted = part.to(device, torch.float64)
        wanted = wanted if transform is None else transform.fold(wanted)
        piece = quantize(wanted, scheme.weights.format, scheme.weights.rule, f"{name}.weight")
        check_rounded(piece, wanted, name)
        lost.append((piece.dequantize(torch.float64) - wanted).norm())
        norms.append(wanted.norm())
        parts = {key: tensor.cpu() for key, tensor in piece.parts.tensors.items()}
        pieces.append(QTensor(piece.codes.cpu(), piece.parts.with_tensors(parts), piece.format))
    whole = QTensor.one_above_other(pieces)
    tensors = {PACKED: whole.packed()} | {PART + key: tensor for key, tensor in whole.parts.tensors.items()}
    if transform is not None:
        tensors |= {f"{SITE}_input.{key}": tensor.cpu() for key, tensor in transform.stored().items()}
    if (bias := outer.get(f"{name}.bias")) is not None:
        tensors["bias"] = bias
    error = error_ratio(torch.stack(lost).norm(), torch.stack(norms).norm())
    return QuantizedHead(tensors, LinearReport(name, (rows, width), SITE, float(error), None, None))


def in_place_of_weight(family: Family, outer: dict[str, Tensor], head: QuantizedHead) -> dict[str, Tensor]:
    """The tensors outside of the decoder blocks, with the quantized head replacing the original one."""
    kept = {name: tensor for name, tensor in outer.items() if name != f"{family.head}.weight"}
    return kept | {f"{family.head}.{name}": tensor for name, tensor in head.tensors.items()}


def install_quantized_head(run: BlockRun, model: PreTrainedModel, head: QuantizedHead) -> None:
    """Install the quantized head in an otherwise finished model."""
    install_head(model, run.scheme, run.family)
    module = model.get_submodule(run.family.head)
    moved = {
        name: tensor.to(run.device, run.dtype if name == "bias" else tensor.dtype)
        for name, tensor in head.tensors.items()
    }
    fill(module, moved, run.family.head)
