"""Distillation of the whole network: the divergence of the logits, through all decoder blocks at once.

The loss is KL(original || quantized) or, with its reverse, b KL(quantized || original) + (1 - b) KL(original ||
quantized). b is the mean probability that the original gives the tokens of the text (RCP, arXiv 2502.15779, has it from
BitDistiller, 2402.10631). If the original is confident, its likely tokens count most; otherwise its whole distribution
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mxrot.calibration import ONE, World, block_arguments, first_hidden
from mxrot.cuda_graphs import Replays
from mxrot.layers import check_logits, fused_norms, logits_of, score_heads, shared_heads
from mxrot.models import Family, Site
from mxrot.progress import Progress, silent
from mxrot.sections import Tuning
from mxrot.tuning.gains import LearnedGain, learned_gains
from mxrot.tuning.loop import Check, Problem, TuningCheckpoint, deterministic, tune
from mxrot.tuning.shares import at_once, split_windows
from mxrot.tuning.straight_through import Divergence, WeightedDivergence
from mxrot.tuning.tuned_network import TunedNetwork, tuned_network
from mxrot.watching import Watch

LOGIT_TOKENS = 2048
"""The number of positions whose logits exist at once."""
CHECKPOINT_BYTES = 40e9
"""Above this estimate of their size, activations are recomputed in the backward pass."""
PROBED_WINDOWS = 32
"""The number of training windows on which the original's probability of the text is measured."""


@dataclass(frozen=True)
class Network:
    """A model without its embedding: blocks, final norm and head, applied to hidden states of one batch."""

    model: PreTrainedModel
    family: Family
    arguments: Sequence[dict[str, Any]]
    """The keyword arguments of each block."""
    recompute: bool = False

    def forward(self, hidden: Tensor) -> Tensor:
        """The states that the head reads, [tokens, hidden]."""
        blocks = self.model.get_submodule(self.family.blocks).children()
        for block, keywords in zip(blocks, self.arguments, strict=True):
            output: Any
            if self.recompute:
                output = checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False, **keywords)
            else:
                output = block(hidden, **keywords)
            hidden = output[0] if isinstance(output, tuple) else output
        normed: Tensor = self.model.get_submodule(self.family.final_norm)(hidden)
        return normed.flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of such states, [tokens, vocabulary]."""
        return logits_of(self.model, hidden)


def tune_network(
    model: PreTrainedModel,
    original: PreTrainedModel,
    family: Family,
    windows: Tensor,
    given: int,
    options: Tuning,
    generator: torch.Generator,
    active_sites: Callable[[int], Sequence[Site]],
    rounding_type: Callable[[str], torch.dtype],
    tuning_checkpoint: TuningCheckpoint | None = None,
    progress: Progress = silent,
    watch: Watch | None = None,
    world: World = ONE,
) -> list[Check]:
    """Tune `model`, quantized and on its device, towards `original` on token windows [W, T]; in place.

    The processes of `world` call this together with equal models and windows, and take a part of each batch. The first
    `given` windows are text, the others were written by a model. `active_sites` gives the quantized sites of a block,
    `rounding_type` the type that a tensor is rounded to, by its full name.
    """
    device = model.get_submodule(family.embedding).weight.device
    assert isinstance(device, torch.device)
    check_logits(original, windows)
    train, test = split_windows(len(windows), options.held_out)
    train = torch.cat([train[train < given].repeat(options.repeats), train[train >= given]])
    blocks = list(model.get_submodule(family.blocks).children())
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float()
    gains = _gains(model, family, options, rounding_type)

    def type_of(index: int, name: str) -> torch.dtype:
        return rounding_type(f"{family.block_prefix(index)}.{name}")

    tuned = tuned_network(blocks, active_sites, gains, type_of, options)
    batch_windows = at_once(options.batch_windows, world)
    recompute = _activation_bytes(model, tuned, batch_windows, windows.shape[1]) > CHECKPOINT_BYTES
    student = Network(model, family, block_arguments(model, family, windows[:1]), recompute)
    teacher = Network(original, family, block_arguments(original, family, windows[:1]))
    reverse = mean_probability(teacher, windows[train[:PROBED_WINDOWS]]) if options.loss == "weighted" else None

    replay = Replays()

    def run(step: Callable[..., Tensor], batch: Tensor) -> Tensor:
        """Call step(student's and teacher's first hidden states)."""
        return replay(step.__name__, step, *(first_hidden(m, family, batch) for m in (model, original)))

    def divergence(expected: Tensor, found: Tensor) -> Tensor:
        """The mean loss in nats per token, for the states [tokens, hidden] of both; float32."""
        with torch.no_grad():
            wanted = teacher.logits(expected)
        mean: Tensor
        if reverse is None:
            mean = Divergence.apply(student.logits(found), wanted)
        else:
            mean = WeightedDivergence.apply(student.logits(found), wanted, reverse)
        return mean

    def learn(first: Tensor, wanted: Tensor) -> Tensor:
        """Add the gradients of the mean divergence, and return it."""
        with torch.no_grad():
            expected = teacher.forward(wanted)
        tuned.begin()
        with lower_precision(device):
            hidden = student.forward(first)
            leaf = hidden.detach().requires_grad_()
            total = torch.zeros((), device=device)
            for parts in zip(expected.split(LOGIT_TOKENS), leaf.split(LOGIT_TOKENS), strict=True):
                loss = divergence(*parts) * (len(parts[0]) / len(leaf))
                loss.backward()
                total += loss.detach()
        hidden.backward(leaf.grad)
        return total

    def measure(first: Tensor, wanted: Tensor) -> Tensor:
        """The divergence, summed over tokens."""
        expected = teacher.forward(wanted)
        tuned.begin()
        with lower_precision(device):
            hidden = student.forward(first)
            losses = [
                divergence(*parts) * len(parts[0])
                for parts in zip(expected.split(LOGIT_TOKENS), hidden.split(LOGIT_TOKENS), strict=True)
            ]
        return torch.stack(losses).sum()

    def backward(chosen: Tensor) -> float:
        return float(run(learn, windows[chosen]))

    @torch.no_grad()
    def held_out_loss() -> float:
        own = test.tensor_split(world.size)[world.rank]
        losses = [float(run(measure, windows[part])) for part in own.split(batch_windows) if len(part)]
        tuned.settle()
        return world.total(sum(losses)) / (len(test) * windows.shape[1])

    problem = Problem(tuned.groups(options), backward, held_out_loss, tuned.settle, train, "distillation")
    with deterministic(), torch.enable_grad(), shared_heads(model, original), fused_norms(model):
        checks = tune(problem, options, generator, tuning_checkpoint, progress, watch, world)
    tuned.finish()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return checks


def _gains(
    model: PreTrainedModel, family: Family, options: Tuning, rounding_type: Callable[[str], torch.dtype]
) -> list[LearnedGain]:
    """The gains of the norms of all blocks and of the last one, if they are learned relative to their start."""
    if not options.norm_rate or options.moves == "levels":
        return []
    return [
        gain
        for place in (family.blocks, family.final_norm)
        for gain in learned_gains(model.get_submodule(place), place, family.norms_add_one, rounding_type)
    ]


def lower_precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 matrix products on a GPU. The hidden states stay float32."""
    return nullcontext() if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def mean_probability(teacher: Network, windows: Tensor) -> float:
    """The teacher's mean probability, 0 to 1, of the tokens of `windows` [W, T], except the first of each."""
    total = 0.0
    for window in windows:
        states = teacher.forward(first_hidden(teacher.model, teacher.family, window[None]))[:-1]
        targets = window[1:].to(states.device)
        for part, own in zip(states.split(LOGIT_TOKENS), targets.split(LOGIT_TOKENS), strict=True):
            likely = teacher.logits(part).float().log_softmax(dim=-1).gather(-1, own[:, None])
            total += float(likely.exp().sum())
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def _activation_bytes(model: PreTrainedModel, tuned: TunedNetwork, windows: int, length: int) -> float:
    """The approximate bytes kept for a backward pass: each linear's input and output, twice the size for what lies
    between them, and attention's scores and probabilities if they are written out."""
    scores = model.config.get_text_config().num_hidden_layers * score_heads(model) * length
    return windows * length * 8.0 * (sum(sum(shape) for shape in tuned.shapes) + scores)
