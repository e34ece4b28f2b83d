"""Where the time of a step goes: its kernels by kind, and the time between them.

While torch.profiler records a few steps, the linears of the decoder blocks, the head, attention and what quantizes
inputs run in named ranges. A kernel belongs to the innermost range in which it was launched, and to "the rest" (norms,
rotary embeddings, activations, writes to the cache) if there is none. All kernels of the head belong to the head, those
that quantize its inputs included. On a CPU operators take the place of kernels. Named ranges do not survive
torch.compile, so the step must not be compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel

from mxrot.bench.timing import Seconds
from mxrot.kernels.dispatch import has_triton
from mxrot.layers import InputTransform, QuantLinear
from mxrot.models import find_family

PRODUCTS = "products of linears"
QUANTIZERS = "quantizers of inputs"
ATTENTION = "attention"
HEAD = "head"
REST = "the rest"
UNKNOWN = "launch not recorded"
"""Kernels that the profiler cannot trace back to a range."""
KINDS = (PRODUCTS, QUANTIZERS, ATTENTION, HEAD, REST, UNKNOWN)

STEPS = 7
"""The number of steps that are recorded. The one with the median time counts."""
_PREFIX = "mxrot: "
_STEP = "step"
_FUNCTIONS = (
    ("torch.nn.functional", "scaled_dot_product_attention", ATTENTION),
    ("mxrot.layers.fixed_packed_cache", "decode_attention", ATTENTION),
    ("mxrot.layers.product", "quantized_input", QUANTIZERS),
    ("mxrot.kernels.dispatch", "_fused_or_applied", QUANTIZERS),
    ("mxrot.kernels.dispatch", "apply_matrices", QUANTIZERS),
)
_TRITON_FUNCTIONS = (
    ("mxrot.kernels.fused.rotate_quantize", "rotate_quantize_e5m2", QUANTIZERS),
    ("mxrot.kernels.fused.rotate_quantize", "rotate_quantize_packed", QUANTIZERS),
    ("mxrot.kernels.fused.quantize_rows", "quantize_rows", QUANTIZERS),
)
"""Functions that run in a range: the module in which they are looked up, their name, and their kind."""


@dataclass(frozen=True)
class Part:
    """The kernels of one kind."""

    seconds: float = 0.0
    launches: int = 0

    def plus(self, seconds: float) -> Part:
        """With one more kernel."""
        return Part(self.seconds + seconds, self.launches + 1)


@dataclass(frozen=True)
class Breakdown:
    """The time of one step by the kinds of its kernels."""

    step: Seconds
    """The time of the whole step, on a GPU as a CUDA graph."""
    parts: dict[str, Part]
    """The kernels of each kind, in the order of KINDS. UNKNOWN only if there are such kernels."""

    @property
    def idle(self) -> float:
        """The seconds of the step without those of its kernels. Negative if kernels overlap in the graph."""
        return self.step.median - sum(part.seconds for part in self.parts.values())

    def as_record(self) -> dict[str, Any]:
        """The breakdown for a JSON file, in seconds."""
        parts = {kind: vars(part) for kind, part in self.parts.items()}
        return {"step": vars(self.step), "parts": parts, "idle": self.idle}


def break_down(step: Callable[[], Any], seconds: Seconds, model: PreTrainedModel) -> Breakdown | None:
    """The kernels of `step`, which calls `model` and takes `seconds`. None if the profiler records no kernels."""
    is_gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with in_ranges(model):
        step()  # compiles kernels
        with profile(activities=activities) as recorded:
            for _ in range(STEPS):
                with record_function(_PREFIX + _STEP):
                    step()
                    if is_gpu:
                        torch.cuda.synchronize(model.device)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    found = sorted(parts_of_steps(events, is_gpu), key=lambda parts: sum(part.seconds for part in parts.values()))
    if not found or not found[-1]:
        return None
    middle = found[len(found) // 2]
    kinds = [kind for kind in KINDS if kind in middle or kind != UNKNOWN]
    return Breakdown(seconds, {kind: middle.get(kind, Part()) for kind in kinds})


@contextmanager
def in_ranges(model: PreTrainedModel) -> Iterator[None]:
    """While open, the linears, the head, attention and the quantizers of inputs run in named ranges of the profiler."""
    family = find_family(model.config, "the model")
    blocks = model.get_submodule(family.blocks).modules()
    ranged: list[tuple[Any, str, str]] = [(model.get_submodule(family.head), "forward", HEAD)]
    ranged += [(module, "forward", PRODUCTS) for module in blocks if isinstance(module, (nn.Linear, QuantLinear))]
    ranged += [(InputTransform, "lead", QUANTIZERS)]
    functions = _FUNCTIONS + (_TRITON_FUNCTIONS if has_triton() else ())
    ranged += [(import_module(module), name, kind) for module, name, kind in functions]
    with ExitStack() as stack:
        for owner, name, kind in ranged:
            stack.enter_context(_in_range(owner, name, kind))
        yield


@contextmanager
def _in_range(owner: Any, name: str, kind: str) -> Iterator[None]:
    """While open, the function `name` of a module, of a class or of a file runs in a range."""
    function, is_own = getattr(owner, name), name in vars(owner)

    def ranged(*arguments: Any, **named: Any) -> Any:
        with record_function(_PREFIX + kind):
            return function(*arguments, **named)

    setattr(owner, name, ranged)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)


def parts_of_steps(events: Sequence[dict[str, Any]], is_gpu: bool) -> list[dict[str, Part]]:
    """The kernels of each step by kind, from the events of a Chrome trace. On a CPU, its operators."""
    ranges = [
        (event["ts"], -event["dur"], event["name"].removeprefix(_PREFIX))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(_PREFIX)
    ]
    starts = sorted(ranges, reverse=True)
    opened: list[tuple[float, str]] = []
    found: list[dict[str, Part]] = []
    for launched, seconds, is_known in sorted(_kernels(events) if is_gpu else _operators(events)):
        while starts and starts[-1][0] <= launched:
            start, minus_duration, kind = starts.pop()
            opened = [one for one in opened if one[0] >= start] + [(start - minus_duration, kind)]
            if kind == _STEP:
                found.append({})
        opened = [one for one in opened if one[0] >= launched]
        if opened:
            kinds = [kind for _, kind in opened]
            kind = HEAD if HEAD in kinds else REST if kinds[-1] == _STEP else kinds[-1]
            kind = kind if is_known else UNKNOWN
            found[-1][kind] = found[-1].get(kind, Part()).plus(seconds)
    return found


def _kernels(events: Sequence[dict[str, Any]]) -> Iterator[tuple[float, float, bool]]:
    """When each kernel was launched, in microseconds, its seconds, and whether its launch was recorded. Otherwise its
    own start is given. Time that it shares with earlier kernels is left out."""
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", ())
    }
    end = 0.0
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    for event in sorted((event for event in events if event.get("cat") in kinds), key=lambda event: event["ts"]):
        start = event["ts"]
        launched = launches.get(event["args"].get("correlation"))
        seconds = max(0.0, min(event["dur"], start + event["dur"] - end)) / 1e6
        end = max(end, start + event["dur"])
        yield (start, seconds, False) if launched is None else (launched, seconds, True)


def _operators(events: Sequence[dict[str, Any]]) -> Iterator[tuple[float, float, bool]]:
    """When each operator was called, in microseconds, and its seconds. Those called by other operators are left out."""
    end = 0.0
    calls = [(event["ts"], event["dur"]) for event in events if event.get("cat") == "cpu_op"]
    for start, duration in sorted(calls, key=lambda call: (call[0], -call[1])):
        if start >= end:
            end = start + duration
            yield start, duration / 1e6, True
