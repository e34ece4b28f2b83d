"""Run decoder blocks on the calibration windows, and keep between passes what need not be computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.calibration.hooks import StopForwardError, watched_inputs
from mxrot.calibration.known import Ending, KnownOutputs
from mxrot.calibration.placement import Placement, may_remember
from mxrot.calibration.statistics import LargestMagnitude
from mxrot.calibration.world import ONE, World
from mxrot.errors import NumericsError
from mxrot.models.family import PassedOn

HELD = "held"
"""How the names of groups of batches begin that nothing is fitted to."""
See = Callable[[Tensor], None]
"""Is shown inputs [windows, tokens, K], batch by batch."""


class Executor:
    """Runs one decoder block after the other on the windows of this process.

    What is kept between passes is written here alone, in the order of a block's life:

    1. `begin(block)`: nothing is known of it. Once more, with the readers of its norms, when smoothing has changed it.
    2. For each site, in the order in which they compute: `expect_last(linear)`, if its submodule will be done with it;
       `observe` and `watch` show inputs, and keep outputs of norms, inputs for the next pass, and how that submodule
       ends; `forget_inputs()` once nobody asks for them again.
    3. `children_done(names)`: the submodules that hold no more sites. The outputs of one are computed from its last
       linear, where it ends with that, or by the next pass; no pass runs it after that.
    4. `advance(name)`: the hidden states become the block's outputs. `end()` instead, where no block follows.
    """

    _hidden: list[Tensor]
    """By batch, as `placement` keeps them."""
    _passed: dict[int, Any]
    """By batch, what the block before gave beside them, where blocks take that."""
    _position: int
    """Of the block among those of the model."""
    _block: nn.Module | None
    _known: KnownOutputs
    _kept: dict[int, dict[str, Tensor]]
    """By batch, inputs of modules that the next pass will ask for again."""
    _last_linear: str | None
    """The linear that a submodule is expected to end with."""
    _endings: dict[int, Ending]
    """By batch, where it does."""

    def __init__(
        self,
        hidden: list[Tensor],
        arguments: Sequence[dict[str, Any]],
        placement: Placement,
        world: World = ONE,
        dtype: torch.dtype | None = None,
        groups: Mapping[str, range] | None = None,
        passes_on: PassedOn | None = None,
    ) -> None:
        """Before the first block. `hidden` are batches [windows, tokens, hidden_size], as `placement` keeps them, of
        this process of `world`; `arguments` what each decoder block is called with besides, as of `block_arguments`.
        `dtype` is that of the hidden states where there may be none. `groups` are batches by what they hold: those
        whose names begin with "held" are for no statistic that something is fitted to. `passes_on` is as that of a
        family."""
        self.arguments, self.placement, self.world = arguments, placement, world
        self.groups = {} if groups is None else dict(groups)
        self.dtype = hidden[0].dtype if dtype is None else dtype
        self.passes_on = passes_on
        self._hidden, self._passed, self._position = hidden, {}, 0
        self.end()

    def another(self) -> Executor:
        """The same for a block of another model, before anything has run."""
        options = self.world, self.dtype, self.groups, self.passes_on
        found = Executor(list(self._hidden), self.arguments, self.placement, *options)
        found._passed, found._position = dict(self._passed), self._position
        return found

    def by_itself(self, hidden: list[Tensor]) -> Executor:
        """One that runs the same module on other batches, where that computes, in no world; nothing is kept yet."""
        found = Executor(hidden, self.arguments, Placement(self.placement.device), dtype=self.dtype)
        found._position = self._position
        found.begin(self.block)
        return found

    # The life of a block.

    def begin(self, block: nn.Module, readers: Mapping[str, frozenset[str]] | None = None) -> None:
        """Run `block` from now on, of which nothing is known.

        `readers` are its norms that will not change any more, and which of its submodules read the output of each.
        """
        self.end()
        self._block = block
        self._known = KnownOutputs(self.placement, readers or {})

    def expect_last(self, linear: str | None) -> None:
        """The submodule of the site that is watched next may end with `linear`; None: with none that is known."""
        self._last_linear, self._endings = linear, {}

    def forget_inputs(self) -> None:
        """Release the inputs that `watch` has kept; they are not needed any more."""
        self._kept = {}

    @torch.no_grad()
    def children_done(self, names: Iterable[str]) -> None:
        """These submodules of the block will not change any more: their outputs are kept once they are computed."""
        self._known.want(names)
        if self._last_linear is not None:
            linear = self.block.get_submodule(self._last_linear)
            for index, ending in self._endings.items():
                self._known.note(_child(self._last_linear), index, ending.output(linear))
        self.expect_last(None)

    def advance(self, name: str) -> None:
        """Replace the hidden states by the block's outputs: what the next block takes.

        NumericsError with `name` if one is NaN or Inf, in whatever process.
        """
        largest = LargestMagnitude()
        for index, given in enumerate(self._given(self.batches)):
            output = _first(given)
            largest.update(output)
            self._hidden[index] = self.placement.put(output)
            if self.passes_on is not None:
                self._passed[index] = self.placement.put(given[1])
            self._known.forget_batch(index)
        self.end()
        self._position += 1
        if not torch.isfinite(largest.result(self.world)):
            raise NumericsError(f"{name}: its output holds NaN or Inf on the calibration text")

    def end(self) -> None:
        """Keep nothing of the block, nor the block."""
        self._block = None
        self._known = KnownOutputs(self.placement, {})
        self.forget_inputs()
        self.expect_last(None)

    # Passes.

    def outputs(self, batches: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Outputs of the block for these batches (all by default); none where a hook stopped the pass."""
        return map(_first, self._given(self.batches if batches is None else batches))

    @torch.no_grad()
    def _given(self, batches: Sequence[int]) -> Iterator[Any]:
        """What the block gives, as it gives it."""
        for index in batches:
            passed = {}
            if self.passes_on is not None:
                passed[self.passes_on.keyword] = self.placement.get(self._passed.get(index))
            try:
                with self._known.answering(self.block, index):
                    given = self.block(self.placement.get(self._hidden[index]), **self.keywords | passed)
            except StopForwardError:
                continue
            yield given

    def observe(self, watchers: Sequence[tuple[str, See]], batches: Sequence[int] | None = None) -> None:
        """Show each watcher the inputs of its module, in one pass that ends at the last one listed."""
        with ExitStack() as stack:
            for position, (name, see) in enumerate(watchers, 1):
                stops = position == len(watchers)
                stack.enter_context(watched_inputs(self.block.get_submodule(name), see, stops))
            for _ in self.outputs(batches if watchers else ()):
                pass

    def watch(
        self, modules: Sequence[str], batches: Sequence[int] | None = None, keeps: bool = False
    ) -> Iterator[list[Tensor]]:
        """Batch by batch, the inputs of `modules`, in the order in which they run; the block runs no further.

        With `keeps` they are kept for the next call, as far as memory goes.
        """
        for index in self.batches if batches is None else batches:
            kept = self._kept.pop(index, {})
            is_kept = kept.keys() >= set(modules)
            seen = [kept[name] for name in modules] if is_kept else self._watch(modules, index)
            if keeps and may_remember(sum(x.nbytes for one in self._kept.values() for x in one.values()), seen):
                self._kept[index] = dict(zip(modules, seen, strict=True))
            yield seen

    def _watch(self, modules: Sequence[str], index: int) -> list[Tensor]:
        """The inputs of `modules` on one batch.

        The child that the last of them is in runs to its end if its output is wanted, or if it may end with that one.
        """
        seen: list[Tensor] = []
        given: list[Tensor] = []
        last, child = modules[-1], _child(modules[-1])
        is_wanted = self._known.wants(child)

        def at_end(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if is_wanted:
                self._known.note(child, index, output)
            else:
                self._note_ending(index, Ending.of(seen[-1], given[-1], output))
            raise StopForwardError

        stops = not is_wanted and last != self._last_linear
        with ExitStack() as stack:
            for name in modules:
                module = self.block.get_submodule(name)
                stack.enter_context(watched_inputs(module, seen.append, stops and name == last))
            if is_wanted:
                self._known.forget(child, index)  # its parts have to run
            if not stops:
                note = self.block.get_submodule(last).register_forward_hook(lambda _, x, output: given.append(output))
                stack.callback(note.remove)
                stack.callback(self.block.get_submodule(child).register_forward_hook(at_end).remove)
            for _ in self.outputs([index]):
                pass
        return seen

    def _note_ending(self, index: int, ending: Ending | None) -> None:
        """As far as memory goes."""
        if ending is not None and may_remember(sum(kept.x.nbytes for kept in self._endings.values()), [ending.x]):
            self._endings[index] = ending

    # What a block is called with.

    @property
    def block(self) -> nn.Module:
        """The one that has begun."""
        assert self._block is not None, "no block has begun"
        return self._block

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of this block."""
        return self.arguments[self._position]

    @property
    def batches(self) -> range:
        """Positions of the batches."""
        return range(len(self._hidden))

    def hidden(self, index: int) -> Tensor:
        """The hidden states [windows, tokens, hidden_size] of a batch, where the block computes."""
        return self.placement.get(self._hidden[index])

    @property
    def fitted(self) -> Sequence[int]:
        """Positions of the batches that something may be fitted to."""
        held = {index for name, places in self.groups.items() if name.startswith(HELD) for index in places}
        return [index for index in self.batches if index not in held] if held else self.batches

    def tokens_of(self, batches: Sequence[int]) -> int:
        """Tokens of some batches, of all processes, which ask together."""
        return self.world.count(sum(self._hidden[index].shape[0] * self._hidden[index].shape[1] for index in batches))

    def stacked(self, windows: Sequence[int]) -> Tensor:
        """Hidden states [windows, tokens, hidden_size] of windows by their numbers, where the block computes."""
        places = [self._places[window] for window in windows]
        return torch.stack([self.placement.get(self._hidden[batch][row]) for batch, row in places])

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """Batch, and row in it, of each window."""
        return [(batch, row) for batch, hidden in enumerate(self._hidden) for row in range(len(hidden))]

    @property
    def windows(self) -> int:
        """How many this process has."""
        return len(self._places)

    @cached_property
    def tokens(self) -> int:
        """Tokens that are fitted to, of all processes, which ask together for the first time."""
        return self.world.count(self._own_tokens)

    @cached_property
    def tokens_before(self) -> int:
        """Those of processes of lower rank; they ask together for the first time."""
        return self.world.before(self._own_tokens)

    @property
    def _own_tokens(self) -> int:
        return sum(self._hidden[index].shape[0] * self._hidden[index].shape[1] for index in self.fitted)


def _first(given: Any) -> Any:
    """The hidden states, of what a block gives."""
    return given[0] if isinstance(given, tuple) else given


def _child(name: str) -> str:
    """The direct submodule of a block that a module is, or lies in."""
    return name.split(".")[0]
