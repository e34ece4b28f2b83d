"""Distillation of the whole network: KL(original || quantized) of the logits, through all decoder blocks at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mxrot.calibration import block_arguments, first_hidden
from mxrot.cuda_graphs import Replays
from mxrot.layers import check_logits, fused_norms, logits_of, score_heads, shared_heads
from mxrot.models import Family, Site
from mxrot.progress import Progress, silent
from mxrot.sections import Tuning
from mxrot.tuning.loop import Check, Problem, TuningCheckpoint, deterministic, split_windows, tune
from mxrot.tuning.straight_through import Divergence
from mxrot.tuning.tunable import TunableBlock, TunableLinear, parameter_groups, settle

LOGIT_TOKENS = 2048
"""Positions whose logits exist at once."""
CHECKPOINT_BYTES = 40e9
"""Activations above this (estimated) are computed again in the backward pass."""


@dataclass(frozen=True)
class Network:
    """A model without its embedding: blocks, final norm and head, on hidden states of one batch."""

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
        """Of such states, [tokens, vocabulary]."""
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
    tuning_checkpoint: TuningCheckpoint | None = None,
    progress: Progress = silent,
) -> list[Check]:
    """Tune `model`, quantized and on its device, towards `original` on token windows [W, T]; in place.

    The first `given` windows are text, the others were written by `original`. `active_sites` gives those of
    a block that are quantized.
    """
    device = model.get_submodule(family.embedding).weight.device
    assert isinstance(device, torch.device)
    check_logits(original, windows)
    train, test = split_windows(len(windows), options.held_out)
    train = torch.cat([train[train < given].repeat(options.repeats), train[train >= given]])
    blocks = list(model.get_submodule(family.blocks).children())
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float()
    tunable = [TunableBlock.of(block, active_sites(index), options.margin) for index, block in enumerate(blocks)]
    recompute = _activation_bytes(model, options.batch_windows, windows.shape[1]) > CHECKPOINT_BYTES
    student = Network(model, family, block_arguments(model, family, windows[:1]), recompute)
    teacher = Network(original, family, block_arguments(original, family, windows[:1]))

    replay = Replays()

    def run(step: Callable[..., Tensor], batch: Tensor) -> Tensor:
        """step(student's and teacher's first hidden states)."""
        return replay(step.__name__, step, *(first_hidden(m, family, batch) for m in (model, original)))

    def divergence(expected: Tensor, found: Tensor) -> Tensor:
        """The mean of KL(teacher || student) in nats a token, for the states [tokens, hidden] of both; float32."""
        with torch.no_grad():
            wanted = teacher.logits(expected)
        mean: Tensor = Divergence.apply(student.logits(found), wanted)
        return mean

    def learn(first: Tensor, wanted: Tensor) -> Tensor:
        """Adds the gradients of the mean divergence, and gives it."""
        with torch.no_grad():
            expected = teacher.forward(wanted)
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
        losses = [float(run(measure, windows[part])) for part in test.split(options.batch_windows)]
        settle(tunable)
        return sum(losses) / (len(test) * windows.shape[1])

    groups = parameter_groups(tunable, options)
    problem = Problem(groups, backward, held_out_loss, partial(settle, tunable), train, "distillation")
    with deterministic(), torch.enable_grad(), shared_heads(model, original), fused_norms(model):
        checks = tune(problem, options, generator, tuning_checkpoint, progress)
    for block in tunable:
        block.finish()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return checks


def lower_precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 matrix products on a GPU; the hidden states stay float32."""
    return nullcontext() if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16)


def _activation_bytes(model: PreTrainedModel, windows: int, length: int) -> float:
    """About what a backward pass keeps: each linear's input and output, twice for what lies between them; scores that
    attention writes out, and the probabilities that they become."""
    weights = [module.offset for module in model.modules() if isinstance(module, TunableLinear)]
    scores = model.config.num_hidden_layers * score_heads(model) * length
    return windows * length * 8.0 * (sum(sum(weight.shape) for weight in weights) + scores)
