"""Known outputs of a block's submodules, so that a pass need not compute them again."""

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
    """Outputs of submodules that no longer change, by batch, for those that have run.

    `readers` are norms, with all submodules that read the output of each. An output of a norm is kept while one of its
    readers has yet to run.
    """

    def __init__(self, placement: Placement, readers: Mapping[str, frozenset[str]]) -> None:
        self.placement, self.readers = placement, readers
        self._outputs: dict[str, dict[int, Any]] = {name: {} for name in readers}

    def want(self, names: Iterable[str]) -> None:
        """Keep the outputs of these submodules from now on."""
        for name in names:
            self._outputs.setdefault(name, {})

    def wants(self, name: str) -> bool:
        """True if the outputs of this submodule are kept."""
        return name in self._outputs

    def batches(self, name: str) -> list[int]:
        """The batches for which the output of a submodule is known, in order."""
        return sorted(self._outputs.get(name, {}))

    def note(self, name: str, index: int, output: Any) -> None:
        """Keep the output of a submodule on batch `index`."""
        self._outputs[name][index] = self.placement.put(without_scores(output))

    def forget(self, name: str, index: int) -> None:
        """Forget an output: the submodule has to run again on batch `index`."""
        self._outputs[name].pop(index, None)

    def forget_batch(self, index: int) -> None:
        """Forget everything about batch `index`, which is no longer needed."""
        for outputs in self._outputs.values():
            outputs.pop(index, None)

    @contextmanager
    def answering(self, block: nn.Module, index: int) -> Iterator[None]:
        """While open, known outputs of batch `index` are not computed again, and wanted outputs are kept."""
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
        """True if all readers of the output of this norm are known."""
        readers = self.readers.get(name)
        return readers is not None and all(index in self._outputs.get(reader, {}) for reader in readers)

    def _see(self, name: str, index: int, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if name not in self.readers:
            self.note(name, index, output)
            return
        # A norm. If hidden states leave the device, its outputs do not stay there either: they take less time than
        # copies.
        outputs = self._outputs[name]
        if not self.placement.is_on_host and may_remember(sum(known.nbytes for known in outputs.values()), [output]):
            outputs[index] = output


def _answering(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """While open, `module` computes nothing and returns `output`."""
    return running(module, lambda *arguments, **keywords: output)


def without_scores(output: Any) -> Any:
    """A submodule's output, with None for attention scores [W, heads, tokens, tokens], which no block reads."""
    if not isinstance(output, tuple):
        return output
    return tuple(None if isinstance(part, Tensor) and part.dim() == 4 else part for part in output)


@dataclass(frozen=True)
class Ending:
    """The last step of a submodule on one batch: a linear, whose output is returned, possibly followed by None."""

    x: Tensor
    """The input of the linear."""
    others: tuple[None, ...] | None
    """The values after it in the returned tuple, if it is a tuple; else None."""

    @staticmethod
    def of(x: Tensor, given: Tensor, output: Any) -> Ending | None:
        """The ending of a submodule with a linear that computed `given` from `x`; None if it does more than return
        that."""
        first, *others = without_scores(output) if isinstance(output, tuple) else (output,)
        if first is not given or any(other is not None for other in others):
            return None
        return Ending(x, (None,) * len(others) if isinstance(output, tuple) else None)

    def output(self, linear: nn.Module) -> Any:
        """The output of the submodule with this linear in its place."""
        return linear(self.x) if self.others is None else (linear(self.x), *self.others)
