"""Distillation of the whole network: KL(original || quantized) of the logits, through all decoder blocks at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mxrot.calibration import BlockInputs, first_block_inputs
from mxrot.models import Family
from mxrot.tuning.loop import Check, Keeper, Problem, Tuning, deterministic, split_windows, tune
from mxrot.tuning.tunable import TunableBlock, TunableLinear

LOGIT_TOKENS = 2048
"""Positions whose logits exist at once."""
CHECKPOINT_BYTES = 40e9
"""Activations above this (estimated) are computed again in the backward pass."""


@dataclass(frozen=True)
class Network:
    """A model without its embedding: blocks, final norm and head, on hidden states of one batch."""

    model: PreTrainedModel
    family: Family
    recompute: bool = False

    def hidden(self, inputs: BlockInputs, batch: int) -> Tensor:
        """The states that the head reads."""
        hidden = inputs.hidden[batch]
        for block in self.model.get_submodule(self.family.blocks).children():
            if self.recompute:
                hidden = checkpoint(block, hidden, use_reentrant=False, **inputs.arguments[batch])
            else:
                hidden = block(hidden, **inputs.arguments[batch])
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        normed: Tensor = self.model.get_submodule(self.family.final_norm)(hidden)
        return normed

    @property
    def head(self) -> nn.Module:
        return self.model.get_submodule(self.family.head)


def divergence(teacher: Tensor, student: Tensor, teacher_head: nn.Module, student_head: nn.Module) -> Tensor:
    """The mean of KL(teacher || student) in nats a token, for hidden states [tokens, hidden]; float32."""
    expected = torch.log_softmax(teacher_head(teacher).float(), dim=-1)
    found = torch.log_softmax(student_head(student).float(), dim=-1)
    return torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True) / len(teacher)


def tune_network(
    model: PreTrainedModel,
    original: PreTrainedModel,
    family: Family,
    windows: Tensor,
    options: Tuning,
    generator: torch.Generator,
    ignore: tuple[str, ...] = (),
    keeper: Keeper | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Check]:
    """Tune `model`, quantized and on its device, towards `original` on token windows [W, T]; in place."""
    device = model.get_submodule(family.embedding).weight.device
    assert isinstance(device, torch.device)
    train, test = (windows[part] for part in split_windows(len(windows), options.held_out))
    blocks = list(model.get_submodule(family.blocks).children())
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float()
    tunable = [
        TunableBlock.of(block, family.active_sites(index, ignore), options.margin) for index, block in enumerate(blocks)
    ]
    recompute = _activation_bytes(model, options.batch_windows * windows.shape[1]) > CHECKPOINT_BYTES
    student, teacher = Network(model, family, recompute), Network(original, family)

    def backward(chosen: Tensor) -> float:
        batch = train[chosen]
        inputs, wanted = (first_block_inputs(m, family, batch, len(batch)) for m in (model, original))
        with torch.no_grad():
            expected = teacher.hidden(wanted, 0).flatten(0, 1)
        with lower_precision(device):
            hidden = student.hidden(inputs, 0).flatten(0, 1)
            leaf = hidden.detach().requires_grad_()
            total = torch.zeros((), device=device)
            pairs = list(zip(expected.split(LOGIT_TOKENS), leaf.split(LOGIT_TOKENS), strict=True))
            for teacher_part, student_part in pairs:
                share = len(teacher_part) / len(leaf)
                loss = divergence(teacher_part, student_part, teacher.head, student.head) * share
                loss.backward()
                total += loss.detach()
        hidden.backward(leaf.grad)
        return float(total)

    @torch.no_grad()
    def held_out_loss() -> float:
        losses = []
        for batch in test.split(options.batch_windows):
            inputs, wanted = (first_block_inputs(m, family, batch, len(batch)) for m in (model, original))
            expected = teacher.hidden(wanted, 0).flatten(0, 1)
            with lower_precision(device):
                hidden = student.hidden(inputs, 0).flatten(0, 1)
                for parts in zip(expected.split(LOGIT_TOKENS), hidden.split(LOGIT_TOKENS), strict=True):
                    losses.append(divergence(*parts, teacher.head, student.head) * len(parts[0]))
        settle()
        return float(torch.stack(losses).sum()) / test.numel()

    def settle() -> None:
        for block in tunable:
            block.settle()

    offsets = [parameter for block in tunable for parameter in block.offsets()]
    groups: list[tuple[Sequence[nn.Parameter], float]] = [(offsets, options.offset_rate)]
    corrections = [p for block in tunable for p in block.corrections()]
    if options.transform_rate > 0 and corrections:
        groups.append((corrections, options.transform_rate))
    else:
        for block in tunable:
            block.fix_transforms()
    problem = Problem(groups, backward, held_out_loss, settle, len(train), "distillation")
    with deterministic(), torch.enable_grad():
        checks = tune(problem, options, generator, keeper, progress)
    for block in tunable:
        block.finish()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return checks


def lower_precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 matrix products on a GPU; the hidden states stay float32."""
    return nullcontext() if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16)


def _activation_bytes(model: PreTrainedModel, tokens: int) -> float:
    """About what a backward pass keeps: each linear's input and output, twice for what lies between them."""
    weights = [module.value for module in model.modules() if isinstance(module, TunableLinear)]
    return tokens * sum(8.0 * sum(weight.shape) for weight in weights)
