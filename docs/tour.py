"""Prints the numbers of docs/tour.md: one block of 32 weights of the demo model on its way into a checkpoint.

python docs/tour.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.formats import QTensor, fake_quantize, get_format, quantize
from mxrot.formats.exponents import E8M0_BIAS
from mxrot.models import WeightFiles, find_model
from mxrot.transforms import BlockDiagonal
from mxrot.transforms.orders import hadamard_matrix

NAME = "model.layers.0.self_attn.q_proj.weight"
FORMAT = get_format("mxfp4")
RULE = FORMAT.rule("even")


def main() -> None:
    weight = WeightFiles(find_model("demo")).read(NAME).double()
    block = weight[0, :32]
    rotation = BlockDiagonal(hadamard_matrix(32)[None])
    applied = rotation.as_applied()

    show("The weights", rows(block, "{:9.5f}"))
    tell("plain", block)
    entries = (hadamard_matrix(32)[0, 0], rotation.to_stored()[0, 0], applied.matrices[0, 0, 0])
    show("An entry of T: fitted, stored, applied", [" ".join(f"{float(entry):.9f}" for entry in entries)])
    rotated = applied.fold(block)
    show("The weights after T^-T", rows(rotated, "{:9.5f}"))
    tell("rotated", rotated)
    both = [block_errors(part) for part in (weight, applied.fold(weight))]
    show(
        "All blocks of the matrix",
        [
            f"blocks {both[0].numel()}",
            f"mean relative error, plain {both[0].mean():.4f}, rotated {both[1].mean():.4f}",
            f"the rotation is better in {(both[1] < both[0]).double().mean():.1%} of them",
        ],
    )


def tell(what: str, block: Tensor) -> None:
    """From the values of a block to its bytes, and what they stand for."""
    found = quantize(block, FORMAT, RULE)
    byte = int(found.scales.stored)
    scale = 2.0 ** (byte - E8M0_BIAS)
    largest = float(block.abs().max())
    show(
        f"Its scale, {what}",
        [
            f"largest |w| = {largest:.6f} = {largest / scale:.4f} x 2^{byte - E8M0_BIAS}",
            f"scale byte {byte} = 0x{byte:02x}, the scale is 2^({byte} - {E8M0_BIAS}) = {scale}",
        ],
    )
    show(f"In units of the scale, {what}", rows(block / scale, "{:9.3f}"))
    show(f"Rounded to E2M1, {what}", rows(FORMAT.element.decode(found.codes, torch.float64), "{:9.1f}"))
    show(f"As codes, {what}", rows(found.codes, "{:>9x}"))
    show(f"Packed, {what}", [" ".join(f"{byte:02x}" for byte in found.packed().tolist())])
    back = QTensor.from_packed(found.packed(), found.scales, FORMAT).dequantize(torch.float64)
    show(f"Dequantized, {what}", rows(back, "{:9.5f}"))
    error = (back - block).norm() / block.norm()
    show(f"Relative error, {what}", [f"||Q(w) - w|| / ||w|| = {float(error):.4f}"])


def block_errors(weight: Tensor) -> Tensor:
    """Relative error of each block."""
    blocks = weight.unflatten(-1, (-1, 32))
    back = fake_quantize(weight, FORMAT, RULE).unflatten(-1, (-1, 32))
    return (back - blocks).norm(dim=-1) / blocks.norm(dim=-1)


def rows(values: Tensor, form: str) -> list[str]:
    """Eight values a line."""
    return ["".join(form.format(value) for value in line.tolist()) for line in values.view(-1, 8)]


def show(title: str, lines: list[str]) -> None:
    print(f"{title}\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
