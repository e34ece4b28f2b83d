"""What benchmarks/accuracy.py measures: tables of recipes, with changes, seeds and the bounds they must meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """One row: a recipe with changes, over seeds; the mean perplexity must lie in [low, high]."""

    label: str
    recipe: str | None
    """None is the model as it is."""
    changes: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    low: float = 0.0
    high: float | None = None
    relative: float | None = None
    """Bound of the second text's perplexity relative to FP16's."""


FLOOR = {"weights.rule": "floor", "activations.rule": "floor"}
BLOCK = {"transform.sharing": "block"}
LONGER = {"transform.steps": 128}
ERROR = {"transform.score": "error"}
SMOOTH = {"smoothing.alpha": 0.6}
SMOOTH_NOT_O = {**SMOOTH, "smoothing.skip": ["o"]}
THREE = (0, 1, 2)
SITES = ("qkv", "o", "gate_up", "down")
LINEARS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
ROTATION = {
    "transform.method": "outlier",
    "transform.sharing": "block",
    "smoothing.alpha": 0.6,
}
SEARCH = {
    "transform.method": "outlier",
    "transform.start": "moments",
    "transform.score": "joint",
    "transform.sample": "both",
}
STATIC = {"rounding.scales": "fixed", "rounding.columns": "descending"}
NVFP4 = {
    "weights.format": "nvfp4",
    "weights.rule": "absmax",
    "activations.format": "nvfp4",
    "activations.rule": "absmax",
    "rounding.scales": "fixed",
}
MXFP6 = {"weights.format": "mxfp6_e2m3", "activations.format": "mxfp6_e2m3"}
TEXT_ONLY = {"calibration.generated": 0.0}
ONLY_INPUTS = {"weights.format": "mxint8", "rounding.method": "rtn"}


def only(site: str) -> dict[str, Any]:
    """Leave all other sites as they are."""
    return {"ignore": [linear for other in SITES if other != site for linear in LINEARS[other]]}


def mxrot(label: str, recipe: str = "mxrot", seeds: tuple[int, ...] = (0,), **changes: Any) -> Run:
    """A row of the ablation: `mxrot` on the text alone, with something added, taken away or replaced.

    Without windows that the model writes itself nothing in it is drawn by a seed.
    """
    return Run(label, recipe, TEXT_ONLY | changes, seeds)


def around(value: float, share: float) -> dict[str, float]:
    """Bounds `share` below and above `value`."""
    return {"low": value * (1 - share), "high": value * (1 + share)}


FORMATS = tuple(
    mxrot(f"{recipe}, {name}", recipe, **changes)
    for recipe in ("mxrot", "mxrot-vllm")
    for name, changes in {
        "floor for inputs": {"activations.rule": "floor"},
        "rceil for inputs": {"activations.rule": "rceil"},
        "nvfp4": NVFP4,
        "mxfp6": MXFP6,
        "W4A8": {"activations.format": "mxfp8_e4m3"},
        "W4A16": {"activations": "none"},
    }.items()
)

TABLES: dict[str, tuple[Run, ...]] = {
    "base": (
        Run("FP16", None, **around(21.77, 0.003)),
        Run("rtn, even", "rtn", **around(65.5, 0.03)),
        Run("rtn, floor", "rtn", FLOOR, **around(108.4, 0.03)),
        Run("smoothing + hadamard", "hadamard", SMOOTH, **around(37.3, 0.03)),
        Run("smoothing (not o) + hadamard", "hadamard", SMOOTH_NOT_O, **around(37.3, 0.03)),
        Run("duquant++ (site)", "duquant++", seeds=THREE, high=37.6),
        Run("duquant++ (site, 128 steps)", "duquant++", LONGER, seeds=THREE, high=37.6),
        Run("duquant++ (block)", "duquant++", BLOCK, seeds=THREE, high=36.4),
        Run("duquant++ (block, 128 steps)", "duquant++", {**BLOCK, **LONGER}, seeds=THREE, high=36.4),
        Run("duquant++ (block, least error)", "duquant++", {**BLOCK, **ERROR}, seeds=THREE),
        Run("duquant++-gptq (block)", "duquant++-gptq", seeds=THREE, high=31.0),
        Run("duquant++-gptq (block, 128 steps)", "duquant++-gptq", LONGER, seeds=THREE, high=31.0),
        Run("duquant++-released", "duquant++-released", low=31.0, high=33.5),
        Run("duquant++-released-gptq", "duquant++-released-gptq", seeds=THREE, low=28.5, high=30.5),
        Run("hadamard", "hadamard"),
        Run("smoothquant", "smoothquant"),
    ),
    "ablation": (
        Run("FP16", None),
        Run("mxrot", "mxrot", seeds=THREE, high=28.3, relative=1.36),
        Run("generated text, half as much", "mxrot", {"calibration.generated": 0.5}, seeds=THREE),
        mxrot("on the text alone"),
        mxrot("to nearest", **{"rounding.method": "rtn"}),
        mxrot("target own", **{"rounding.target": "own"}),
        mxrot("target original", **{"rounding.target": "original"}),
        mxrot("tokens equal", **{"rounding.tokens": "equal"}),
        mxrot("exponents of the rule", **{"rounding.scales": "reached"}),
        mxrot("exponents least error", **{"rounding.scales": "reached", "weights.rule": "mse"}),
        mxrot("exponents 7.25", **{"rounding.scales": "reached", "weights.rule": "7.25"}),
        mxrot("static order", **STATIC),
        mxrot("static order, 7.25", **{**STATIC, "weights.rule": "7.25"}),
        *(mxrot(f"damping {d}", **{"rounding.damping": d}) for d in (0.01, 0.1, 1.0)),
        *(mxrot(f"target damping {d}", **{"rounding.target_damping": d}) for d in (0.3, 3.0, 10.0)),
        *(mxrot(f"moment damping {d}", **{"transform.damping": d}) for d in (0.001, 0.1)),
        *(mxrot(f"condition {c:g}", **{"transform.condition": c}) for c in (8.0, 30.0)),
        mxrot("no transform", **{"transform.method": "identity"}),
        mxrot("hadamard", **{"transform.method": "hadamard"}),
        mxrot("hadamard, smoothing", **{"transform.method": "hadamard", "smoothing.alpha": 0.6}),
        mxrot("outlier rotation, smoothing", seeds=THREE, **ROTATION),
        mxrot("joint search from moments", seeds=THREE, **SEARCH),
        Run("mxrot-vllm", "mxrot-vllm", seeds=THREE, high=31.0),
        mxrot("mxrot-vllm, on the text alone", "mxrot-vllm"),
        mxrot("mxrot-vllm, smoothing 0.6", "mxrot-vllm", **{"smoothing.alpha": 0.6}),
        mxrot("mxrot-vllm, no smoothing", "mxrot-vllm", smoothing="none"),
        mxrot("mxrot-vllm, hadamard", "mxrot-vllm", **{"transform.method": "hadamard"}),
        *FORMATS,
    ),
    "where": (
        Run("FP16", None),
        mxrot("all"),
        mxrot("weights only", activations="none"),
        mxrot("activations only", **ONLY_INPUTS),
        *(mxrot(f"only {site}", **only(site)) for site in SITES),
    ),
    "tuned": (
        Run("FP16", None),
        Run("mxrot-tuned", "mxrot-tuned", seeds=THREE, high=24.2, relative=1.20),
    ),
    "reload": (  # with --reload; how long tuning goes on does not matter to it
        Run("mxrot", "mxrot"),
        Run("mxrot-vllm", "mxrot-vllm"),
        Run("mxrot-tuned, 40 steps", "mxrot-tuned", {"tuning.steps": 40, "tuning.generated": 1.0}),
    ),
    "finer": (  # scales that are no powers of two, of inputs a token
        Run("FP16", None, **around(21.77, 0.003)),
        Run("duquant++-released", "duquant++-released", low=31.0, high=33.5),
        Run("duquant++-released-gptq", "duquant++-released-gptq", seeds=THREE, low=28.5, high=30.5),
        *(run for run in FORMATS if run.label.endswith("nvfp4")),
    ),
    "time": (
        Run("warm-up", "duquant++"),
        Run("duquant++", "duquant++", seeds=THREE),
        Run("duquant++-gptq (block)", "duquant++-gptq", seeds=THREE),
    ),
    "smoke": (Run("original", None), Run("rtn", "rtn"), Run("duquant++", "duquant++")),
}
