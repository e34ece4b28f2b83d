"""How stock vLLM multiplies MXFP4 weights, device by device, as its Python code of one version says."""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "0.32.0"
"""Of vLLM: what is said of it here, and in `vllm.verdict`, holds for this one."""


@dataclass(frozen=True)
class Arithmetic:
    """How stock vLLM multiplies MXFP4 weights on one kind of device."""

    device: str
    computes: str
    """Bits of weights and activations, and by what; `none` where vLLM refuses."""
    note: str = ""
    majors: tuple[int, ...] = ()
    """Compute capabilities of NVIDIA's devices, before the point."""


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
    Arithmetic("V100, T4 (7.x)", "none", "the scheme wants 8.0", (7,)),
    Arithmetic("MI350 (gfx950)", "W4A4, AITER"),
    Arithmetic("other AMD", "W4A4, emulated with amd-quark", "scale rule even, slow"),
    Arithmetic("CPU", "none", "no kernel"),
)
"""What is chosen with no option, when everything is installed that vLLM's wheel asks for."""


def arithmetic_of(capability: tuple[int, int] | None) -> Arithmetic:
    """What stock vLLM chooses on a device of NVIDIA; a CPU for None, `unclear` where nobody has looked."""
    if capability is None:
        return next(one for one in DEVICES if one.device == "CPU")
    for one in DEVICES:
        if capability[0] in one.majors:
            return one
    return Arithmetic(f"compute capability {capability[0]}.{capability[1]}", "unclear", "nobody has looked")
