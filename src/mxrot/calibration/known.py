"""What is known of submodules of a block, so that a pass need not compute it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mxrot.calibration.hooks import running
from mxrot.calibration.placement import Placement, may_remember


class KnownOutputs:
    """Outputs of submodules that will not change any more, by batch, as far as they have run.

    `readers` are norms, and which submodules read the output of each; nothing else does. It is kept as long as one of
    them has to run.
    """

    def __init__(self, placement: Placement, readers: Mapping[str, frozenset[str]]) -> None:
        self.placement, self.readers = placement, readers
        self._outputs: dict[str, dict[int, Any]] = {name: {} for name in readers}

    def want(self, names: Iterable[str]) -> None:
        """From now on keep the outputs of these submodules."""
        for name in names:
            self._outputs.setdefault(name, {})

    def wants(self, name: str) -> bool:
        """Are the outputs of this submodule kept?"""
        return name in self._outputs

    def batches(self, name: str) -> list[int]:
        """Those whose output of a submodule is known, in order."""
        return sorted(self._outputs.get(name, {}))

    def note(self, name: str, index: int, output: Any) -> None:
        """Keep what a submodule gave on batch `index`."""
        self._outputs[name][index] = self.placement.put(without_scores(output))

    def forget(self, name: str, index: int) -> None:
        """The submodule has to run again on batch `index`."""
        self._outputs[name].pop(index, None)

    def forget_batch(self, index: int) -> None:
        """Nothing of batch `index` will be asked for any more."""
        for outputs in self._outputs.values():
            outputs.pop(index, None)

    @contextmanager
    def answering(self, block: nn.Module, index: int) -> Iterator[None]:
        """While open, what is known of batch `index` is not computed again, and what is wanted is kept."""
        with ExitStack() as stack:
            for name, outputs in self._outputs.items():
                module = block.get_submodule(name)
                if self._is_read_no_more(name, index):
                    outputs.pop(index, None)
                    stack.enter_context(_answering(module, None))
                elif index in outputs:
                    stack.enter_context(_answering(module, self.placement.get(outputs[index])))
                else:
                    hook = partial(self._see, name, index)
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def _is_read_no_more(self, name: str, index: int) -> bool:
        """Is everything that reads the output of this norm known?"""
        readers = self.readers.get(name)
        return readers is not None and all(index in self._outputs.get(reader, {}) for reader in readers)

    def _see(self, name: str, index: int, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if name not in self.readers:
            self.note(name, index, output)
            return
        # A norm: where hidden states do not stay on the device these do not either, they take less time than copies.
        outputs = self._outputs[name]
        if not self.placement.is_on_host and may_remember(sum(known.nbytes for known in outputs.values()), [output]):
            outputs[index] = output


def _answering(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """While open, `module` computes nothing and gives `output`."""
    return running(module, lambda *arguments, **keywords: output)


def without_scores(output: Any) -> Any:
    """A submodule's output, with None for scores of attention [W, heads, tokens, tokens], which no block reads."""
    if not isinstance(output, tuple):
        return output
    return tuple(None if isinstance(part, Tensor) and part.dim() == 4 else part for part in output)


@dataclass(frozen=True)
class Ending:
    """The last step of a submodule on one batch: a linear, whose output it passes on, perhaps with None behind it."""

    x: Tensor
    """What goes into the linear."""
    others: tuple[None, ...] | None
    """What follows in the tuple that the submodule gives, as far as it is read; None where it gives no tuple."""

    @staticmethod
    def of(x: Tensor, given: Tensor, output: Any) -> Ending | None:
        """How a submodule goes on after a linear that made `given` of `x`; None if it does more than pass that on."""
        first, *others = without_scores(output) if isinstance(output, tuple) else (output,)
        if first is not given or any(other is not None for other in others):
            return None
        return Ending(x, (None,) * len(others) if isinstance(output, tuple) else None)

    def output(self, linear: nn.Module) -> Any:
        """What the submodule gives with this linear in that place."""
        return linear(self.x) if self.others is None else (linear(self.x), *self.others)
