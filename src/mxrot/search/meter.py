"""KL of mixtures on a few windows. Only the blocks that change are computed.

Blocks before the first raised one give the same outputs as before. So the input of each block is kept for the mixture
that was settled last, and a pass begins at the first block that differs. Several processes measure several mixtures at
once, each with a model of its own, and all get every figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.errors import NumericsError
from mxrot.evaluation.divergence import means_of_states
from mxrot.evaluation.perplexity import states_of
from mxrot.layers import check_logits
from mxrot.layers.cache_size import cache_of
from mxrot.progress import Progress
from mxrot.search.bits import Mixture, spelled
from mxrot.search.kept import KeptSearch
from mxrot.search.raised import RaisedModel
from mxrot.search.shares import figures_of

NOT_FINITE = "the logits of a mixture hold NaN or Inf; nothing can be compared"


class Original:
    """The last hidden states of the original on some windows, and its head."""

    def __init__(self, head: PreTrainedModel, batches: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """`batches` are token windows, `states` are the original's last hidden states on them [W, T, hidden]."""
        self.head, self.batches, self.states = head, batches, states

    @torch.no_grad()
    def kl(self, model: PreTrainedModel, states: Sequence[Tensor] | None = None) -> list[float]:
        """KL(original || model) of each window, in nats per token. `states` are the model's own, if they are known."""
        own = (states_of(model, ids) for ids in self.batches) if states is None else states
        with_original = zip(own, self.states, self.batches, strict=True)
        means = [means_of_states(model, hidden, self.head, wanted, ids)[0] for hidden, wanted, ids in with_original]
        found: list[float] = torch.cat(means).double().tolist()
        if not all(value < float("inf") for value in found):
            raise NumericsError(NOT_FINITE)
        return found


class Meter:
    """A ruler for mixtures of one model. Measurements in the folder are not repeated."""

    def __init__(
        self, raised: RaisedModel, original: Original, name: str, kept: KeptSearch, progress: Progress, about: int
    ) -> None:
        """`name` names the windows, `about` is the expected number of measurements. FamilyError if `logits_of` does not
        know the model's logits."""
        check_logits(raised.model, original.batches[0])
        self._raised, self._original, self._name, self._kept = raised, original, name, kept
        self._progress, self._about = progress, about
        self._wanted: Mixture | None = None
        """The mixture to settle before the next pass."""
        self._settled: Mixture = {}
        self._broken: set[str] = set()
        """The mixtures without finite figures. Asking for one is an error."""
        self._entries: list[list[Tensor]] = []
        """By batch, the input of each block for the settled mixture. Empty if none is settled."""
        self.stages: dict[str, tuple[Mixture, str]] = {}
        """The mixtures that were measured here, by their spelling, with the first stage that asked for each."""

    def kl(self, mixture: Mixture, stage: str) -> float:
        """The mean KL over windows."""
        values = self.values(mixture, stage)
        return sum(values) / len(values)

    def values(self, mixture: Mixture, stage: str) -> list[float]:
        """KL of each window."""
        what = self._what(mixture)
        self.stages.setdefault(spelled(mixture), (dict(mixture), stage))
        self._tell(len(self.stages), stage)
        if not self._knows(mixture):
            self._measure([mixture])
        if what in self._broken:
            with self._kept.world.first_goes_ahead():  # all processes know it, one reports it
                raise NumericsError(NOT_FINITE)
        return self._kept.measured[what]

    def values_of(self, mixtures: Mapping[str, Mixture]) -> dict[str, list[float]]:
        """KL of each window for several mixtures, by the stages that ask for them."""
        found: dict[str, list[float]] = {}
        left = list(mixtures.values())
        for stage, mixture in mixtures.items():
            self.expect(left[len(found) :], stage)
            found[stage] = self.values(mixture, stage)
        return found

    def expect(self, mixtures: Sequence[Mixture], stage: str) -> None:
        """Measure these in parallel: each process takes one unknown mixture, unless the first one is known, as only
        that one is certainly needed. The other figures are kept until they are asked for, and are not part of the
        search before that."""
        if self._kept.world.size == 1 or not mixtures or self._knows(mixtures[0]):
            return
        unknown = {spelled(mixture): mixture for mixture in mixtures if not self._knows(mixture)}
        self._tell(len(self.stages) + 1, stage)
        self._measure([*unknown.values()][: self._kept.world.size])

    def settle(self, mixture: Mixture) -> None:
        """Let passes begin from the block inputs of this mixture."""
        self._wanted = dict(mixture)

    def _tell(self, count: int, stage: str) -> None:
        self._progress(count, max(self._about, count + 1), f"measuring {stage}")

    def _what(self, mixture: Mixture) -> str:
        return f"{self._name}: {spelled(mixture)}"

    def _knows(self, mixture: Mixture) -> bool:
        what = self._what(mixture)
        return what in self._kept.measured or what in self._broken

    def _measure(self, mixtures: Sequence[Mixture]) -> None:
        """Measure at most as many mixtures as there are processes. All processes must call this."""
        tasks = [partial(self._measured, mixture) for mixture in mixtures]
        for mixture, figures in zip(mixtures, figures_of(tasks, self._kept.world), strict=True):
            if any(map(math.isnan, figures)):
                self._broken.add(self._what(mixture))
            else:
                self._kept.note(self._what(mixture), figures)

    @torch.no_grad()
    def _measured(self, mixture: Mixture) -> list[float]:
        model = self._raised.model
        if self._wanted is not None and cache_of(model) is None:
            self._settle(self._wanted)
        first = self._first_change(mixture)
        self._raised.become(mixture)
        states = []
        for number, ids in enumerate(self._original.batches):
            with self._from(first, self._entries[number][first] if first else None):
                states.append(states_of(model, ids))
        return self._original.kl(model, states)

    def _settle(self, mixture: Mixture) -> None:
        first = self._first_change(mixture)
        self._raised.become(mixture)
        entries = []
        for number, ids in enumerate(self._original.batches):
            before = self._entries[number][:first] if first else []
            with self._from(first, self._entries[number][first] if first else None):
                entries.append(before + self._entries_of(ids)[first:])
        self._settled, self._entries, self._wanted = mixture, entries, None

    def _first_change(self, mixture: Mixture) -> int:
        """The first block that differs from the settled mixture, else the last block. 0 if none is settled."""
        if not self._entries:
            return 0
        settled = self._settled
        changed = [cell.block for cell in {*mixture, *settled} if mixture.get(cell) != settled.get(cell)]
        return min(changed, default=len(self._raised.blocks) - 1)

    def _entries_of(self, ids: Tensor) -> list[Tensor]:
        """The input of each block in a pass over a batch."""
        found: list[Tensor] = []

        def see(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found.append(arguments[0] if arguments else keywords["hidden_states"])

        with ExitStack() as stack:
            for block in self._raised.blocks:
                stack.callback(block.register_forward_pre_hook(see, with_kwargs=True).remove)
            states_of(self._raised.model, ids)
        return found

    @contextmanager
    def _from(self, first: int, entry: Tensor | None) -> Iterator[None]:
        """While open, blocks before `first` compute nothing, and `entry` is the input of block `first`."""
        if entry is None:
            yield
            return
        skipped, given = self._raised.blocks[:first], self._raised.family.as_given(entry)
        for block in skipped:
            block.forward = lambda *_, **__: given
        try:
            yield
        finally:
            for block in skipped:
                del block.forward
