"""How stock vLLM multiplies MXFP4 weights on each device, according to the Python code of one version."""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "0.32.0"
"""The vLLM version that the facts here and in `vllm.verdict` were read from."""


@dataclass(frozen=True)
class Arithmetic:
    """How stock vLLM multiplies MXFP4 weights on one kind of device."""

    device: str
    computes: str
    """Bits of weights and activations, and the code that computes; `none`: vLLM refuses."""
    note: str = ""
    majors: tuple[int, ...] = ()
    """Compute capabilities of NVIDIA devices: the digits before the point."""


DEVICES = (
    Arithmetic("B200, B300 (10.x)", "W4A4, FlashInfer", "scale rule rceil", (10,)),
    Arithmetic(
        "RTX 50, RTX PRO (12.x)",
        "unclear",
        "chooses a FlashInfer product that FlashInfer lists for 10.x only; --linear-backend marlin: W4A16",
        (12,),
    ),
    Arithmetic(
        "H100, H200 (9.0)",
        "W4A8, Humming",
        "activations in FP8 E4M3 with a scale a token; --linear-backend marlin: W4A16",
        (9,),
    ),
    Arithmetic("A100, L4, L40S, RTX 30 and 40 (8.x)", "W4A16, Marlin", majors=(8,)),
    Arithmetic("V100, T4 (7.x)", "none", "the scheme needs 8.0", (7,)),
    Arithmetic("MI350 (gfx950)", "W4A4, AITER"),
    Arithmetic("other AMD", "W4A4, emulated with amd-quark", "scale rule even, slow"),
    Arithmetic("CPU", "none", "no kernel"),
)
"""What vLLM chooses without options, if everything that its wheel requires is installed."""


def arithmetic_of(capability: tuple[int, int] | None) -> Arithmetic:
    """What stock vLLM chooses on an NVIDIA device. None stands for a CPU. `unclear` for devices that were not looked
    at."""
    if capability is None:
        return next(one for one in DEVICES if one.device == "CPU")
    for one in DEVICES:
        if capability[0] in one.majors:
            return one
    return Arithmetic(f"compute capability {capability[0]}.{capability[1]}", "unclear", "nobody has looked")
