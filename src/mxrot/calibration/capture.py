"""Run decoder blocks on calibration windows and watch what goes into their linears.

Hooks live in context managers and are gone when they end, whatever happens inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration.statistics import LargestMagnitude
from mxrot.errors import NumericsError
from mxrot.models import Family

CPU = torch.device("cpu")
MOST_REMEMBERED = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes of a norm's outputs, and of a site's inputs, that are kept for a later pass; the rest is computed anew."""
MOST_ON_DEVICE = {"cuda": 1 << 30}
"""Bytes of the states between two blocks that stay on the device between passes, and submodules' outputs with them.
Above, host memory keeps both: the copies take less time than what is computed with them, by far."""


def _may_remember(kept: int, tensors: Iterable[Tensor]) -> bool:
    """Is there room for these beside the bytes that are kept?"""
    added = list(tensors)
    bound = MOST_REMEMBERED.get(added[0].device.type, MOST_REMEMBERED["cpu"])
    return kept + sum(tensor.nbytes for tensor in added) <= bound


class _StopForwardError(Exception):
    """Raised by a hook when a forward pass has shown what it was run for."""


@dataclass(frozen=True)
class Ending:
    """The last step of a submodule on one batch: a linear, whose output it passes on, perhaps with None behind it."""

    x: Tensor
    """What goes into the linear."""
    others: tuple[None, ...] | None
    """What follows in the tuple that the submodule gives, as far as it is read; None where it gives no tuple."""

    def output(self, linear: nn.Module) -> Any:
        """What the submodule gives with this linear in that place."""
        return linear(self.x) if self.others is None else (linear(self.x), *self.others)


@dataclass
class BlockInputs:
    """What a decoder block is called with: hidden states batch by batch, and the same keyword arguments with each."""

    hidden: list[Tensor]
    """[windows, tokens, hidden_size] each, as `put` keeps them."""
    arguments: Sequence[dict[str, Any]]
    """The keyword arguments of each decoder block, as of `block_arguments`."""
    block: int = 0
    """Which of the decoder blocks it is."""
    known: dict[str, dict[int, Any]] = field(default_factory=dict)
    """Submodules of the block that will not change any more, with their outputs by batch, as far as they have run.
    A later pass takes them from here."""
    readers: dict[str, frozenset[str]] = field(default_factory=dict)
    """Which submodules read the output of a norm, and nothing else does. It is remembered, too, as long as one of
    them has to run."""
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """By batch, inputs of modules that the next pass will ask for again."""
    last_linear: str | None = None
    """The linear that a submodule is expected to end with."""
    endings: dict[int, Ending] = field(default_factory=dict)
    """By batch, where it does."""
    device: torch.device = CPU
    """Where the block computes."""
    is_on_host: bool = False
    """Do hidden states and submodules' outputs lie in host memory between passes?"""

    def another(self) -> BlockInputs:
        """The same for a block of another model, before anything has run."""
        return BlockInputs(
            list(self.hidden), self.arguments, self.block, device=self.device, is_on_host=self.is_on_host
        )

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of this block."""
        return self.arguments[self.block]

    def put(self, value: Any) -> Any:
        """A tensor, or the tensors of a tuple, as they are kept between passes; on the host only `get` may read them,
        because the copy may be on its way."""
        if isinstance(value, tuple):
            return tuple(self.put(part) for part in value)
        if not self.is_on_host or not isinstance(value, Tensor):
            return value
        kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=torch.cuda.is_available())
        return kept.copy_(value, non_blocking=True)

    def get(self, value: Any) -> Any:
        """What `put` was given."""
        if isinstance(value, tuple):
            return tuple(self.get(part) for part in value)
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

    @property
    def windows(self) -> int:
        return sum(len(batch) for batch in self.hidden)

    @property
    def tokens(self) -> int:
        """Tokens of all windows together."""
        return sum(batch.shape[0] * batch.shape[1] for batch in self.hidden)


@contextmanager
def watched_inputs(module: nn.Module, see: Callable[[Tensor], None], stop: bool = False) -> Iterator[None]:
    """While open, `see` gets the input of every call of `module`; with `stop` the forward pass then ends there."""

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        see(arguments[0])
        if stop:
            raise _StopForwardError

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def first_block_inputs(model: PreTrainedModel, family: Family, windows: Tensor, batch_windows: int) -> BlockInputs:
    """Inputs of the first decoder block for token windows [W, T]; only the embedding has to hold weights."""
    device = _device_of(model, family)
    inputs = BlockInputs([], block_arguments(model, family, windows[:1]), device=device)
    for batch in windows.split(batch_windows):
        hidden = first_hidden(model, family, batch)
        in_all = windows.numel() * hidden.shape[-1] * hidden.element_size()
        inputs.is_on_host = in_all > MOST_ON_DEVICE.get(device.type, math.inf)
        inputs.hidden.append(inputs.put(hidden))
    return inputs


@torch.no_grad()
def first_hidden(model: PreTrainedModel, family: Family, windows: Tensor) -> Tensor:
    """The hidden states [W, T, hidden] that the first decoder block gets for token windows [W, T]."""
    found: list[Tensor] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(arguments[0] if arguments else keywords["hidden_states"])
        raise _StopForwardError

    handle = model.get_submodule(f"{family.blocks}.0").register_forward_pre_hook(hook, with_kwargs=True)
    try:
        _run_body(model, family, windows)
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def block_arguments(model: PreTrainedModel, family: Family, window: Tensor) -> list[dict[str, Any]]:
    """The keyword arguments of each decoder block for one token window [1, T], from a pass in which no block computes.

    They go with any number of windows of this length, which have no padding: masks and rotary embeddings have a batch
    dimension of 1. Blocks of one kind share their tensors, because the model gives them the same.
    """
    found: list[dict[str, Any]] = []

    def passes_on(hidden_states: Tensor, **keywords: Any) -> Tensor:
        found.append(keywords)
        return hidden_states

    with ExitStack() as stack:
        for block in model.get_submodule(family.blocks).children():
            stack.enter_context(_running(block, passes_on))
        stack.enter_context(watched_inputs(model.get_submodule(family.final_norm), lambda _: None, stop=True))
        _run_body(model, family, window)
    return found


def _run_body(model: PreTrainedModel, family: Family, windows: Tensor) -> None:
    """Run `model` on token windows until a hook stops it."""
    with suppress(_StopForwardError):
        model.get_submodule(family.body)(input_ids=windows.to(_device_of(model, family)), use_cache=False)


def _device_of(model: PreTrainedModel, family: Family) -> torch.device:
    device = model.get_submodule(family.embedding).weight.device
    assert isinstance(device, torch.device)
    return device


@torch.no_grad()
def run_block(block: nn.Module, inputs: BlockInputs, batches: Sequence[int] | None = None) -> Iterator[Tensor]:
    """Outputs of `block` for the batches at these positions (all by default); none where a hook stopped the pass."""
    for index in range(len(inputs.hidden)) if batches is None else batches:
        try:
            with _known_outputs(block, inputs, index):
                output = block(inputs.get(inputs.hidden[index]), **inputs.keywords)
        except _StopForwardError:
            continue
        yield output[0] if isinstance(output, tuple) else output


@contextmanager
def _known_outputs(block: nn.Module, inputs: BlockInputs, index: int) -> Iterator[None]:
    """While open, submodules that have run on batch `index` give the same again, and others are remembered."""
    with ExitStack() as stack:
        for name, outputs in inputs.known.items():
            module = block.get_submodule(name)
            if _is_read_no_more(name, inputs, index):
                outputs.pop(index, None)
                stack.enter_context(_answering(module, None))
            elif index in outputs:
                stack.enter_context(_answering(module, inputs.get(outputs[index])))
            else:
                remember = _remember_some if name in inputs.readers else _remember
                stack.callback(module.register_forward_hook(partial(remember, inputs, outputs, index)).remove)
        yield


def _is_read_no_more(name: str, inputs: BlockInputs, index: int) -> bool:
    """Is everything that reads the output of this norm known?"""
    readers = inputs.readers.get(name)
    return readers is not None and all(index in inputs.known.get(reader, {}) for reader in readers)


def _remember(
    inputs: BlockInputs, outputs: dict[int, Any], index: int, module: nn.Module, arguments: tuple[Any, ...], output: Any
) -> None:
    outputs[index] = inputs.put(_read(output))


def _read(output: Any) -> Any:
    """A submodule's output, with None for scores of attention [W, heads, tokens, tokens], which no block reads."""
    if not isinstance(output, tuple):
        return output
    return tuple(None if isinstance(part, Tensor) and part.dim() == 4 else part for part in output)


def _remember_some(
    inputs: BlockInputs,
    outputs: dict[int, Tensor],
    index: int,
    module: nn.Module,
    arguments: tuple[Any, ...],
    output: Tensor,
) -> None:
    """Where hidden states do not stay on the device these do not either: they take less time than their copies."""
    if not inputs.is_on_host and _may_remember(sum(known.nbytes for known in outputs.values()), [output]):
        outputs[index] = output


def _answering(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """While open, `module` computes nothing and gives `output`."""
    return _running(module, lambda *arguments, **keywords: output)


@contextmanager
def _running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, `module` runs `forward` instead of its own."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def observe_inputs(
    block: nn.Module,
    linear: str,
    inputs: BlockInputs,
    see: Callable[[Tensor], None],
    batches: Sequence[int] | None = None,
) -> None:
    """Show `see` the inputs of one linear of `block`, running the block no further than there."""
    with watched_inputs(block.get_submodule(linear), see, stop=True):
        for _ in run_block(block, inputs, batches):
            pass


def observe_all_inputs(
    block: nn.Module,
    watchers: Sequence[tuple[str, Callable[[Tensor], None]]],
    inputs: BlockInputs,
    batches: Sequence[int] | None = None,
) -> None:
    """Show each watcher the inputs of its linear, in one pass that ends at the last one listed."""
    if not watchers:
        return
    (linear, see), *rest = watchers
    if rest:
        with watched_inputs(block.get_submodule(linear), see):
            observe_all_inputs(block, rest, inputs, batches)
    else:
        observe_inputs(block, linear, inputs, see, batches)


def paired_inputs(
    block: nn.Module, inputs: BlockInputs, original: nn.Module, originals: BlockInputs, modules: Sequence[str]
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Batch by batch, the inputs of `modules` in `block` and in `original`; both run no further than the last one."""
    both = watched_together(block, inputs, modules), watched_together(original, originals, modules)
    for here, there in zip(*both, strict=True):
        yield list(zip(here, there, strict=True))


def watched_together(
    block: nn.Module,
    inputs: BlockInputs,
    modules: Sequence[str],
    batches: Sequence[int] | None = None,
    keeps: bool = False,
) -> Iterator[list[Tensor]]:
    """Batch by batch, the inputs of `modules`, in the order in which they run; the block runs no further.

    With `keeps` they are kept for the next call, as far as memory goes.
    """
    for index in range(len(inputs.hidden)) if batches is None else batches:
        kept = inputs.kept.pop(index, {})
        is_kept = kept.keys() >= set(modules)
        seen = [kept[name] for name in modules] if is_kept else _watch(block, inputs, modules, index)
        if keeps and _may_remember(_bytes_kept(inputs), seen):
            inputs.kept[index] = dict(zip(modules, seen, strict=True))
        yield seen


def _watch(block: nn.Module, inputs: BlockInputs, modules: Sequence[str], index: int) -> list[Tensor]:
    """The inputs of `modules` on one batch.

    The child that the last of them is in runs to its end if its output is wanted, or if it may end with that one.
    """
    seen: list[Tensor] = []
    child, last = block.get_submodule(modules[-1].split(".")[0]), block.get_submodule(modules[-1])
    wanted = inputs.known.get(modules[-1].split(".")[0])
    given: list[Tensor] = []

    def at_end(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if wanted is not None:
            wanted[index] = inputs.put(_read(output))
        elif _may_remember(sum(ending.x.nbytes for ending in inputs.endings.values()), [seen[-1]]):
            ending = _ending(seen[-1], given[-1], output)
            if ending is not None:
                inputs.endings[index] = ending
        raise _StopForwardError

    stops = wanted is None and modules[-1] != inputs.last_linear
    with ExitStack() as stack:
        for name in modules:
            stack.enter_context(watched_inputs(block.get_submodule(name), seen.append, stops and name == modules[-1]))
        if wanted is not None:
            wanted.pop(index, None)  # its parts have to run
        if not stops:
            stack.callback(last.register_forward_hook(lambda _, arguments, output: given.append(output)).remove)
            stack.callback(child.register_forward_hook(at_end).remove)
        for _ in run_block(block, inputs, [index]):
            pass
    return seen


def _ending(x: Tensor, given: Tensor, output: Any) -> Ending | None:
    """How a submodule goes on after a linear that made `given` of `x`; None if it does more than pass that on."""
    first, *others = _read(output) if isinstance(output, tuple) else (output,)
    if first is not given or any(other is not None for other in others):
        return None
    return Ending(x, (None,) * len(others) if isinstance(output, tuple) else None)


def finish_child(block: nn.Module, inputs: BlockInputs) -> None:
    """Note the outputs of the child that ends with the last linear, where only that is left to compute."""
    if inputs.last_linear is not None:
        known = inputs.known[inputs.last_linear.split(".")[0]]
        for index, ending in inputs.endings.items():
            known[index] = inputs.put(ending.output(block.get_submodule(inputs.last_linear)))
    inputs.last_linear, inputs.endings = None, {}


def _bytes_kept(inputs: BlockInputs) -> int:
    return sum(x.nbytes for batch in inputs.kept.values() for x in batch.values())


def advance(block: nn.Module, inputs: BlockInputs, name: str) -> None:
    """Replace the hidden states by the block's outputs: what the next block takes.

    NumericsError with `name` if one is NaN or Inf.
    """
    largest = LargestMagnitude()
    for position, output in enumerate(run_block(block, inputs)):
        largest.update(output)
        inputs.hidden[position] = inputs.put(output)
        for outputs in inputs.known.values():
            outputs.pop(position, None)
    inputs.known = {}
    inputs.block += 1
    if not torch.isfinite(largest.result()):
        raise NumericsError(f"{name}: its output holds NaN or Inf on the calibration text")
