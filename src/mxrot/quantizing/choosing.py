"""Choose among changes of a recipe by their error on text that no fit has seen, for the given model.

The best settings differ between models: how far weights follow a target, the damping of GPTQ, how much of the text the
model writes itself. So each candidate of `[choice]` quantizes the model, and is measured by the divergence of its
logits from the original's, on held-out windows. Windows of the same text are not enough if a fit adapts to a kind of
text. There are two kinds, given text and text that the model writes; `unseen = "kinds"` fits to one of them and
measures on the other.

The score of a candidate is the geometric mean, over the measured kinds, of KL(original || quantized) in nats per token,
so a kind that is hard for every candidate does not dominate. Candidates are tried one after the other, each on top of
those kept so far. One is kept if the score falls. Nothing is random, so a resumed run makes the same choice.
Measurements are stored candidate by candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.choice import Choice
from mxrot.errors import ConfigError, DataError, NumericsError
from mxrot.heap import give_back
from mxrot.layers import check_logits, logits_of
from mxrot.models import Family
from mxrot.progress import Progress, part_of, silent
from mxrot.quantizing.batches import held_out
from mxrot.quantizing.loading import load_original
from mxrot.quantizing.part import BlockRun
from mxrot.quantizing.record import Trial
from mxrot.quantizing.store import BlockStore
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme

LOGIT_TOKENS = 2048
"""The number of positions whose logits exist at once."""
LEAST_KL = 1e-9
"""The least KL in nats per token: a smaller one counts as this, to have a logarithm."""
QUANTIZING_SHARE = 0.9
"""Quantizing's rough share of the time for a candidate; the rest is measuring."""


Quantize = Callable[[Recipe, Tensor, int, Progress], PreTrainedModel]
"""Quantizes the model with another recipe and keeps it in memory. It takes the windows, how many are given text, and
the progress."""


@dataclass(frozen=True)
class Fold:
    """The windows that a candidate is fitted to, and those that it is measured on."""

    text: Tensor
    """Given windows [W, T]; may be empty."""
    written: Tensor
    """The windows written by the model."""
    measured: dict[str, Tensor]
    """The measured windows, by kind of text."""

    def fitted(self, share: float) -> Tensor:
        """The windows to fit to, with this share of the written ones."""
        return torch.cat([self.text, self.written[: round(share * len(self.written))]])


def folds_of(windows: Tensor, given: int, recipe: Recipe) -> list[Fold]:
    """How a recipe's choice uses `windows` [W, T], of which the first `given` are text and the others written.

    DataError if a kind has too few windows to hold some out.
    """
    choice = recipe.choice
    assert choice is not None
    kinds = {"text": windows[:given], "written": windows[given:]}
    kinds = {name: of_kind for name, of_kind in kinds.items() if len(of_kind)}
    held = {name: held_out(len(of_kind), choice.held_out, name) for name, of_kind in kinds.items()}
    nothing = windows[:0]
    if choice.unseen == "windows":
        rest = {name: of_kind[~held[name]] for name, of_kind in kinds.items()}
        measured = {name: of_kind[held[name]] for name, of_kind in kinds.items()}
        return [Fold(rest.get("text", nothing), rest.get("written", nothing), measured)]
    measured = {name: of_kind[held[name]] for name, of_kind in kinds.items()}
    if len(kinds) < 2:
        raise DataError(
            'choice: unseen = "kinds" fits to one kind of text and measures on another, and there is one; give text, '
            'or set choice.unseen = "windows"'
        )
    return [
        Fold(kinds["text"], nothing, {"written": measured["written"]}),
        Fold(nothing, kinds["written"], {"text": measured["text"]}),
    ]


@dataclass(frozen=True)
class Reference:
    """The original on the measured windows: its last hidden states, and the head that reads them."""

    head: PreTrainedModel
    """The original, with its decoder blocks freed of their weights."""
    states: dict[str, list[Tensor]]
    """By kind, the states [T, hidden] of each window."""

    @staticmethod
    @torch.no_grad()
    def of(original: PreTrainedModel, family: Family, windows: dict[str, Tensor]) -> Reference:
        """Run the original, and free its decoder blocks."""
        for of_kind in windows.values():
            check_logits(original, of_kind)
        states = {kind: [_states(original, window) for window in of_kind] for kind, of_kind in windows.items()}
        original.get_submodule(family.blocks).to("meta")
        give_back()
        return Reference(original, states)

    @torch.no_grad()
    def divergences(self, model: PreTrainedModel, windows: dict[str, Tensor]) -> dict[str, Tensor]:
        """KL(original || model) of each window in nats per token, float64 [W] by kind. NumericsError if it is not
        finite."""
        found = {}
        for kind, of_kind in windows.items():
            pairs = zip(of_kind, self.states[kind], strict=True)
            found[kind] = torch.stack(
                [self._divergence(model, _states(model, window), wanted) for window, wanted in pairs]
            )
            if not torch.isfinite(found[kind]).all():
                raise NumericsError("choice: the logits of a candidate hold NaN or Inf; leave it out")
        return found

    def _divergence(self, model: PreTrainedModel, states: Tensor, wanted: Tensor) -> Tensor:
        """The mean KL over positions of the logits that the two heads compute from these states [T, hidden]."""
        total = torch.zeros((), dtype=torch.float64)
        for part, expected in zip(states.split(LOGIT_TOKENS), wanted.split(LOGIT_TOKENS), strict=True):
            logs = logits_of(model, part).float().log_softmax(dim=-1)
            wished = logits_of(self.head, expected).float().log_softmax(dim=-1)
            total += F.kl_div(logs, wished, reduction="sum", log_target=True).double().cpu()
        return total / len(states)


def _states(model: PreTrainedModel, window: Tensor) -> Tensor:
    """The last hidden states [T, hidden]."""
    ids = window[None].to(next(model.get_output_embeddings().parameters()).device)
    states: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states[0]


def choose(
    run: BlockRun,
    folds: Sequence[Fold],
    given: int,
    quantized: Quantize,
    store: BlockStore | None = None,
    progress: Progress = silent,
) -> tuple[Recipe, list[Trial]]:
    """The recipe of a `run` with the kept candidates and without its choice, and the score of each candidate.

    `given` is the number of given windows; the others of a fold are written ones. The original is loaded only if the
    store lacks some results.
    """
    recipe = run.recipe
    choice = recipe.choice
    assert choice is not None
    most = recipe.calibration.written(given)
    checkpoint = None if store is None else store.choice_checkpoint
    known = {} if checkpoint is None else checkpoint.load() or {}
    best, least, trials = replace(recipe, choice=None), math.inf, []
    against: Reference | None = None
    for number, candidate in enumerate(("", *choice.candidates)):
        tried = best.changed(Choice.changes_of(candidate)) if candidate else best
        share = tried.calibration.written(given) / most if most else 0.0
        samples = max(1, tried.calibration.samples)
        plain = replace(
            tried, calibration=replace(tried.calibration, generated=0.0, own=0, samples=samples), tuning=None
        )
        found: dict[str, Tensor] = {}
        for place, fold in enumerate(folds):
            begin = number + place / len(folds)
            told = part_of(progress, begin, QUANTIZING_SHARE / len(folds), 1 + len(choice.candidates))
            keys = {kind: f"{number}.{place}.{kind}" for kind in fold.measured}
            if not known.keys() >= set(keys.values()):
                against = against or _reference(run, folds, progress)
                model = quantized(plain, fold.fitted(share), len(fold.text), told)
                fresh = against.divergences(model, fold.measured)
                del model
                give_back()
                known |= {keys[kind]: values for kind, values in fresh.items()}
                if checkpoint is not None:
                    checkpoint.save(known)
            found |= {kind: known[key] for kind, key in keys.items()}
        means = {kind: float(values.mean()) for kind, values in found.items()}
        score = math.exp(sum(math.log(max(LEAST_KL, mean)) for mean in means.values()) / len(means))
        is_kept = score < least
        if is_kept:
            best, least = tried, score
        trials.append(Trial(candidate, means, score, is_kept))
    return best, trials


def _reference(run: BlockRun, folds: Sequence[Fold], progress: Progress) -> Reference:
    """The reference for all measured windows."""
    progress(0, 1, "opening the original model")
    measured = {kind: of_kind for fold in folds for kind, of_kind in fold.measured.items()}
    return Reference.of(load_original(run.source, run.dtype, run.device), run.family, measured)


def choice_problems(model: PreTrainedModel, family: Family, recipe: Recipe) -> Iterator[ConfigError]:
    """The problems of candidates: those that would install something else than the recipe, from which a checkpoint is
    read, and those that conflict with candidates that may be kept before them."""
    if recipe.choice is None:
        return
    installed = Scheme.of(recipe, family, model)
    for candidate in recipe.choice.candidates:
        if Scheme.of(recipe.with_candidate(candidate), family, model) != installed:
            yield ConfigError(
                f"recipe {recipe.name}: choice: candidates: {candidate!r} installs another transform, which the loaded "
                "model would not know of; quantize once with each, and compare them"
            )
    kept = [replace(recipe, choice=None)]
    for candidate in recipe.choice.candidates:
        try:
            kept += [one.changed(Choice.changes_of(candidate)) for one in kept]
        except ConfigError as error:
            yield ConfigError(
                f"recipe {recipe.name}: choice: candidates: {candidate!r} does not go on top of all before it: {error}"
            )
            return
