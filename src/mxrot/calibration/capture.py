"""Run decoder blocks on calibration windows and watch what goes into their linears.

Hooks live in context managers and are gone when they end, whatever happens inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.calibration.block_inputs import BlockInputs, Ending, bytes_kept, may_remember
from mxrot.calibration.hooks import StopForwardError, running, watched_inputs
from mxrot.calibration.statistics import LargestMagnitude
from mxrot.errors import NumericsError


@torch.no_grad()
def run_block(block: nn.Module, inputs: BlockInputs, batches: Sequence[int] | None = None) -> Iterator[Tensor]:
    """Outputs of `block` for the batches at these positions (all by default); none where a hook stopped the pass."""
    for index in range(len(inputs.hidden)) if batches is None else batches:
        try:
            with _known_outputs(block, inputs, index):
                output = block(inputs.get(inputs.hidden[index]), **inputs.keywords)
        except StopForwardError:
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
    if not inputs.is_on_host and may_remember(sum(known.nbytes for known in outputs.values()), [output]):
        outputs[index] = output


def _answering(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """While open, `module` computes nothing and gives `output`."""
    return running(module, lambda *arguments, **keywords: output)


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
        if keeps and may_remember(bytes_kept(inputs), seen):
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
        elif may_remember(sum(ending.x.nbytes for ending in inputs.endings.values()), [seen[-1]]):
            ending = _ending(seen[-1], given[-1], output)
            if ending is not None:
                inputs.endings[index] = ending
        raise StopForwardError

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


def advance(block: nn.Module, inputs: BlockInputs, name: str) -> None:
    """Replace the hidden states by the block's outputs: what the next block takes.

    NumericsError with `name` if one is NaN or Inf, in whatever process.
    """
    largest = LargestMagnitude()
    for position, output in enumerate(run_block(block, inputs)):
        largest.update(output)
        inputs.hidden[position] = inputs.put(output)
        for outputs in inputs.known.values():
            outputs.pop(position, None)
    inputs.known = {}
    inputs.block += 1
    if not torch.isfinite(largest.result(inputs.world)):
        raise NumericsError(f"{name}: its output holds NaN or Inf on the calibration text")
