"""Record a chain of small GPU operations once, and replay it for other tensors of the same shapes.

A search or a tuning step takes thousands of operations that run for microseconds. Launching them takes longer than
running them, and a CUDA graph launches all of them at once. On a CPU, and at the first call on a GPU (which loads what
the operations need), the function just runs. The results are the same bits in both cases.

The function may also add to gradients that exist before it is recorded. Each replay reads the other tensors that the
function uses again. They must stay at the same address.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    @staticmethod
    def of(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], stream: torch.cuda.Stream) -> _Recording:
        inputs = tuple(tensor.clone() for tensor in tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = function(*inputs)
        return _Recording(graph, inputs, output)

    def play(self, tensors: tuple[Tensor, ...]) -> Tensor:
        for place, tensor in zip(self.inputs, tensors, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.output.clone()


class Replays:
    """Recordings and their GPU memory, for as long as this object lives."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, _Recording | None] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """function(*tensors), all on one device.

        `key` stands for everything else that the function depends on. The function must not wait for the device.
        """
        if not tensors[0].is_cuda:
            return function(*tensors)
        whole = (key, *((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors))
        if whole not in self._recorded:
            self._recorded[whole] = None
            return self._run(function, tensors)
        recording = self._recorded[whole]
        if recording is None:
            recording = self._recorded[whole] = _Recording.of(function, tensors, self._stream(tensors[0].device))
        return recording.play(tensors)

    def _run(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
        # Use the stream of the recording: autograd keeps adding to a gradient on the stream where it began.
        stream, current = self._stream(tensors[0].device), torch.cuda.current_stream(tensors[0].device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            output = function(*tensors)
        current.wait_stream(stream)
        output.record_stream(current)
        return output

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
