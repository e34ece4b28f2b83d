"""The time of calls on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from mxrot.kernels.dispatch import has_triton

REPEATS = 15
CACHE_BYTES = 2e8
"""Operands are taken in turn from this many bytes of copies, more than any cache holds."""
MOST_COPIES = 64
CALLS = 16
"""The least number of calls in a CUDA graph, so that the time to start it does not matter."""
EMPTY_LAUNCH = "empty launch"
COPY_LAUNCH = "launch and copy of [128, 4096] bf16 to fp8"
TIMES = (EMPTY_LAUNCH, COPY_LAUNCH)
"""The ceilings in seconds."""


@dataclass(frozen=True)
class Seconds:
    """The time of one call."""

    median: float
    low: float
    """The lower quartile."""
    high: float

    def __str__(self) -> str:
        return f"{1e6 * self.median:.1f} us ({1e6 * self.low:.1f} to {1e6 * self.high:.1f})"


def copies_for(operand_bytes: float) -> int:
    """The number of copies of operands of this size that are taken in turn."""
    return max(1, min(MOST_COPIES, int(CACHE_BYTES // max(operand_bytes, 1)) + 1))


def seconds_of(
    calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = REPEATS, is_recorded: bool = True
) -> Seconds:
    """The time of one of `calls`, which are made one after the other.

    On a GPU they are recorded as one CUDA graph, so that the time of the device is measured and not the launching of
    operations. If not recorded, operations are launched one by one.
    """
    return seconds_of_each([calls], device, repeats, is_recorded)[0]


def seconds_of_each(
    candidates: Sequence[Sequence[Callable[[], Any]]],
    device: torch.device,
    repeats: int = REPEATS,
    is_recorded: bool = True,
) -> list[Seconds]:
    """As `seconds_of` for each candidate. They take turns, so that a device that slows down affects all of them."""
    found: list[list[float]] = [[] for _ in candidates]
    if device.type != "cuda":
        for repeat, (calls, times) in product(range(repeats + 1), zip(candidates, found, strict=True)):
            seconds = _host_seconds(calls)
            times.extend([seconds] if repeat else [])
    else:
        _device_seconds(candidates, found, device, repeats, is_recorded)
    return [Seconds(median, low, high) for low, median, high in (statistics.quantiles(times, n=4) for times in found)]


def _host_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    started = time.perf_counter()
    _run(calls)
    return (time.perf_counter() - started) / len(calls)


def _device_seconds(
    candidates: Sequence[Sequence[Callable[[], Any]]],
    found: Sequence[list[float]],
    device: torch.device,
    repeats: int,
    is_recorded: bool,
) -> None:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        runs = [_recorded(calls, stream) if is_recorded else (partial(_run, calls), len(calls)) for calls in candidates]
        for repeat, ((run, count), times) in product(range(repeats + 1), zip(runs, found, strict=True)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            run()
            end.record(stream)
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3 / count
            times.extend([seconds] if repeat else [])


def _recorded(calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream) -> tuple[Callable[[], None], int]:
    """A CUDA graph of these calls, at least CALLS, and their number."""
    _run(calls[:2])  # compiles
    times = -(-CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            _run(calls)
    return graph.replay, times * len(calls)


def _run(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def ceilings(device: torch.device) -> dict[str, float]:
    """The ceilings of this device: bytes per second of a copy, read and written, operations per second of products, and
    on a GPU the seconds of an empty kernel, and of one with the loads and stores of quantizing a few rows."""
    is_gpu = device.type == "cuda"
    found = {"copy": copy_speed(device)}
    size = 8192 if is_gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    found["bf16 product"] = 2 * size**3 / seconds_of([lambda: a @ b.mT], device, 7).median
    if is_gpu and torch.cuda.get_device_capability(device) >= (8, 9):
        x, w, one = a.to(torch.float8_e5m2), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
        for name, fast in (("fp8 product", False), ("fp8 product, fast accumulation", True)):
            product = partial(torch._scaled_mm, x, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)
            found[name] = 2 * size**3 / seconds_of([product], device, 7).median
    if is_gpu and has_triton():
        from mxrot.kernels.fused.nothing import half, nothing

        found[EMPTY_LAUNCH] = seconds_of([partial(nothing, a)] * 100, device).median
        few = a.view(-1, 128, 4096)[:MOST_COPIES]
        found[COPY_LAUNCH] = seconds_of([partial(half, x) for x in few], device).median
    return found


def copy_speed(device: torch.device) -> float:
    """The bytes per second, read and written, of the faster of two copies: the library's, which in a CUDA graph can be
    the copy engine, and a kernel."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    ways: list[Callable[[], Any]] = [partial(target.copy_, source), partial(torch.neg, source, out=target)]
    return max(2 * source.nbytes / seconds_of([way], device).median for way in ways)
