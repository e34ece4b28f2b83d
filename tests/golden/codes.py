"""Codes and scales that calibrated methods must give, exactly: GPTQ, the outlier search, second moments and smoothing.

Weights and inputs are small whole numbers, so that they are the same on every machine. What is computed of them is
not, in its last bits: float64 factorizations, and float32 Gaussians that rotations are drawn from. So no position may
lie so close to a tie, or to another prefix of a search, that these would decide: `test_codes.py` moves all inputs by
far more and wants the same codes.

To write the file anew: python -m tests.golden.codes
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mxrot.formats import QTensor, TensorQuantizer, get_format, quantize
from mxrot.rounding.gptq import GPTQ
from mxrot.transforms import SiteSample, TransformMethod, generator_for
from mxrot.transforms.moments import SecondMoment
from mxrot.transforms.outlier import OutlierRotation
from mxrot.transforms.smoothing import smoothing_scales

FILE = Path(__file__).parent / "codes.json"
ROWS, CHANNELS, TOKENS, BLOCK = 8, 64, 96, 32
MXFP4 = get_format("mxfp4")
EVEN = TensorQuantizer(MXFP4, MXFP4.rule("even"))

Move = Callable[[Tensor], Tensor]
"""Changes an input a little, or not."""


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """k * m, |k| < 2^11, m of 1, 2, ... 16: float64, with tails."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-2047, 2048, shape, generator=generator)
    return whole.double() * 2.0 ** torch.randint(0, 5, shape, generator=generator).double()


def inputs() -> Tensor:
    """[tokens, K], every sixteenth channel sixteen times as large."""
    x = whole_numbers(TOKENS, CHANNELS, seed=3)
    x[:, ::16] *= 16
    return x


def weights() -> Tensor:
    return whole_numbers(ROWS, CHANNELS, seed=5)


def rounded_by(method: GPTQ, with_shift: bool = False) -> Callable[[Move], QTensor]:
    """GPTQ of the weights under the Hessian of the inputs."""

    def round_weights(move: Move) -> QTensor:
        x, weight = move(inputs()), move(weights())
        shift = move(whole_numbers(ROWS, TOKENS, seed=7)) @ x / TOKENS if with_shift else None
        return method.round(weight, MXFP4, EVEN.rule, x.T @ x / TOKENS, "golden", shift).weight

    return round_weights


def transformed_by(method: TransformMethod, sharing: str) -> Callable[[Move], QTensor]:
    """The weights, folded against what the method fits, rounded to nearest."""

    def fold(move: Move) -> QTensor:
        x, weight = move(inputs()), move(weights())
        blocks = x.unflatten(-1, (-1, BLOCK))
        seen = {
            "moments": torch.einsum("tgi,tgj->gij", blocks, blocks) / TOKENS,
            "peaks": blocks.transpose(0, 1).float(),
            "spaced": blocks.transpose(0, 1).float(),
        }
        sample = SiteSample(weight, BLOCK, {need: seen[need] for need in method.needs}, EVEN, EVEN)
        transform = method.fit(sample, sharing, generator_for(0, "golden"))  # type: ignore[arg-type]
        return quantize(transform.fold(weight), MXFP4, EVEN.rule)

    return fold


def smoothed(move: Move) -> QTensor:
    """The weights times the scales of smoothing, rounded to nearest."""
    weight = move(weights())
    return quantize(weight * smoothing_scales(move(inputs()).abs().amax(dim=0), weight, 0.5), MXFP4, EVEN.rule)


CASES: dict[str, Callable[[Move], QTensor]] = {
    "gptq reached": rounded_by(GPTQ()),
    "gptq walked": rounded_by(GPTQ(scales="walked", damping=0.3)),
    "gptq fixed, descending": rounded_by(GPTQ(scales="fixed", columns="descending")),
    "gptq towards a target": rounded_by(GPTQ(scales="walked", target="original", target_damping=1.0), with_shift=True),
    "outlier a site": transformed_by(OutlierRotation(), "site"),
    "outlier a block": transformed_by(OutlierRotation(), "block"),
    "outlier, joint score": transformed_by(OutlierRotation(score="joint", sample="both", steps=16), "block"),
    "moments a site": transformed_by(SecondMoment(), "site"),
    "moments a block": transformed_by(SecondMoment(), "block"),
    "moments, conditioned": transformed_by(SecondMoment(condition=8.0), "block"),
    "smoothing": smoothed,
}


def spelled(found: QTensor) -> dict[str, list[str]]:
    """A line a row: codes as one hexadecimal digit each, scale bytes as two."""
    return {
        "codes": ["".join(f"{code:x}" for code in row) for row in found.codes.tolist()],
        "scales": [bytes(row).hex() for row in found.scales.stored.tolist()],
    }


if __name__ == "__main__":
    table = {name: spelled(case(lambda x: x)) for name, case in CASES.items()}
    FILE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {FILE}")
