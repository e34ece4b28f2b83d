"""Find the linears of a decoder block that read the same tensor, from one pass of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mxrot.errors import FamilyError


@dataclass
class Calls:
    """The inputs and outputs of the modules of one decoder block in one pass, in the order in which they ended."""

    inputs: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    """Each tensor with its version, which changes when the tensor is written to."""
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def linears_by_input(self, linears: Iterable[str]) -> list[tuple[str, ...]]:
        """Groups of linears that read the same tensor, in the order of computation."""
        found: dict[tuple[int, int], list[str]] = {}
        wanted = set(linears)
        for name, tensors in self.inputs.items():
            if name in wanted:
                tensor, version = tensors[0]
                found.setdefault((id(tensor), version), []).append(name)
        return [tuple(names) for names in found.values()]

    def makers(self, linear: str) -> list[str]:
        """The modules that returned the same tensor that `linear` reads."""
        read, _ = self.inputs[linear][0]
        return [name for name, tensors in self.outputs.items() if len(tensors) == 1 and tensors[0] is read]


class _WeightReads(TorchFunctionMode):
    """While open, notes the linears whose tensors are used outside of their own forward."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.running: set[str] = set()
        self._owner = {id(tensor): name for name, linear in linears.items() for tensor in linear.parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in _tensors((args, kwargs or {})):
            owner = self._owner.get(id(value))
            if owner is not None and owner not in self.running:
                called = getattr(func, "__name__", str(func))
                self.found[owner] = called
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def block_linears(block: nn.Module, where: str) -> dict[str, nn.Linear]:
    """The linears of a decoder block by their names in it.

    FamilyError for any other weight of two or more dimensions, because its use is unknown.
    """
    found = {}
    for name, module in block.named_modules():
        if type(module) is nn.Linear:
            found[name] = module
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                raise FamilyError(
                    f"{where}: {name}.{own} {list(parameter.shape)} is the weight of a {type(module).__name__}, and "
                    "only plain nn.Linear is understood; its family must be written by hand (docs/add-a-family.md)"
                )
    return found


def traced(model: PreTrainedModel, blocks: list[tuple[str, nn.Module]], ids: Tensor) -> list[Calls]:
    """What the modules of these decoder blocks, given with their full names, did in one pass over `ids`.

    FamilyError, with its name, for a linear that is not called exactly once with one tensor, shares its weight, or
    whose weight is used outside of its own forward.
    """
    calls = [Calls() for _ in blocks]
    linears = {f"{full}.{name}": one for full, block in blocks for name, one in block_linears(block, full).items()}
    _check_apart(model, linears)
    reads = _WeightReads(linears)
    with ExitStack() as stack:
        for own, (full, block) in zip(calls, blocks, strict=True):
            for name, module in block.named_modules():
                if name:
                    stack.enter_context(_noted(module, name, f"{full}.{name}", own, reads.running))
        with torch.no_grad(), reads:
            model(input_ids=ids, use_cache=False)
    for full, called in reads.found.items():
        raise FamilyError(
            f"{full}: its weight is used by {called} outside of its own forward, so no quantized linear can stand in "
            "its place"
        )
    for own, (full, block) in zip(calls, blocks, strict=True):
        for name in block_linears(block, full):
            count = len(own.inputs.get(name, ()))
            if count != 1:
                raise FamilyError(f"{full}.{name}: is called {count} times in a pass; expected once, with one tensor")
    return calls


@contextmanager
def _noted(module: nn.Module, name: str, full: str, calls: Calls, running: set[str]) -> Iterator[None]:
    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        running.add(full)
        if len(arguments) == 1 and not keywords and isinstance(arguments[0], Tensor):
            calls.inputs.setdefault(name, []).append((arguments[0], arguments[0]._version))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        running.discard(full)
        if isinstance(output, Tensor):
            calls.outputs.setdefault(name, []).append(output)

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_apart(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Raise FamilyError if a linear of a block shares a tensor with another module."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        other = owners.setdefault(id(parameter), owner)
        if other != owner and {owner, other} & linears.keys():
            raise FamilyError(f"{owner}: has the same weight as {other}, and they cannot be quantized apart")
