"""The loop that all tuning shares: Adam, a falling learning rate, and early stopping by held-out text."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mxrot.calibration import ONE, World
from mxrot.errors import CheckpointError, NumericsError
from mxrot.progress import Progress, silent
from mxrot.sections import Tuning
from mxrot.tuning.shares import average, step_shares
from mxrot.watching import Watch

ADAM_EPSILON = 1e-12
"""Far below any gradient: those of many million offsets are 1e-7 or less, for a loss that is a mean over tokens."""
KEEP_SECONDS = 60.0
"""The time between two checks at which an unfinished run is stored. It is four times as large as the weights in
float32."""


@dataclass(frozen=True)
class Check:
    """The losses at one check."""

    step: int
    train: float | None
    """The mean since the check before. None at the start, and after a loss that was not finite ended tuning: then the
    check is of the restored parameters."""
    held_out: float


@dataclass
class TuningState:
    """The state of a tuning run."""

    step: int = 0
    checks: list[Check] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)
    """The parameters at the least held-out loss."""

    @property
    def least(self) -> float:
        return min((check.held_out for check in self.checks), default=math.inf)

    def stops(self, patience: int) -> bool:
        """True if the last `patience` checks were no better than an earlier one."""
        if len(self.checks) <= patience:
            return False
        earlier = min(check.held_out for check in self.checks[:-patience])
        return all(check.held_out >= earlier for check in self.checks[-patience:])


class TuningCheckpoint(Protocol):
    """Stores an unfinished tuning run, so that it can be resumed by another process."""

    def load(self) -> dict[str, Tensor] | None:
        """The tensors saved last, or None."""

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Replace the stored tensors."""


@dataclass(frozen=True)
class Group:
    """Parameters with the same settings."""

    parameters: Sequence[nn.Parameter]
    rate: float
    """The peak learning rate."""
    decay: float = 0.0
    """The share of the way back to its start by which a step draws a parameter, in units of the learning rate."""


@dataclass(frozen=True)
class Problem:
    """The problem to tune."""

    groups: Sequence[Group]
    backward: Callable[[Tensor], float]
    """Adds the gradients of the loss on these windows (positions, int64 [n]), and returns the loss."""
    held_out_loss: Callable[[], float]
    settle: Callable[[], None]
    """Called whenever the parameters have changed."""
    windows: Tensor
    """The positions of the windows to train on, int64 [n]. Repeated positions are used that often."""
    name: str
    are_own: bool = False
    """True if each process has other windows, and its own `backward`. By default all have the same."""
    rolls_back: bool = False
    """If a loss is not finite: True ends with the best parameters so far, False raises an error."""


def tune(
    problem: Problem,
    options: Tuning,
    generator: torch.Generator,
    tuning_checkpoint: TuningCheckpoint | None = None,
    progress: Progress = silent,
    watch: Watch | None = None,
    world: World = ONE,
) -> list[Check]:
    """Minimize the loss. The parameters end at the least held-out loss that was seen, the start included.

    The processes of `world` call this together with the same parameters, and take the same steps, each on its share of
    the windows. `held_out_loss` is the same in all; only the first has a checkpoint. NumericsError with the problem's
    name if a loss is not finite, unless the problem rolls back. TimeLimitError after a check, once everything is
    stored, if the next one would probably end too late for `watch`.
    """
    parameters = [parameter for group in problem.groups for parameter in group.parameters]
    if not parameters:
        return []  # every linear is ignored
    optimizer = torch.optim.Adam(
        [{"params": list(group.parameters), "lr": group.rate} for group in problem.groups],
        eps=ADAM_EPSILON,
        fused=parameters[0].is_cuda or None,
    )
    starts = [[p.detach().clone() for p in group.parameters] if group.decay else [] for group in problem.groups]
    batches = list(
        step_shares(problem.windows, options.batch_windows, options.steps, generator, world, problem.are_own)
    )
    every = max(1, options.steps // options.checks)
    state = TuningState()
    if kept := world.hand_out_tensors(None if tuning_checkpoint is None else tuning_checkpoint.load()):
        _restore(kept, parameters, optimizer, state)
        problem.settle()
    watch = watch or Watch()
    watch.skip("look")
    if not state.checks:
        _look(problem, parameters, state, None, watch)
    losses: list[float] = []
    kept_at = time.monotonic()
    while state.step < options.steps and not state.stops(options.patience):
        for group, settings in zip(problem.groups, optimizer.param_groups, strict=True):
            settings["lr"] = group.rate * rate_factor(state.step, options.steps)
        optimizer.zero_grad(set_to_none=False)  # a recorded step adds to the same gradient tensors
        batch = batches[state.step]
        loss = problem.backward(batch.windows) if len(batch.windows) else 0.0
        losses.append(average(parameters, loss, batch.share, world))
        if not math.isfinite(losses[-1]) and problem.rolls_back:
            _go_back(parameters, state)
            problem.settle()
            _look(problem, parameters, state, None, watch)
            break
        if not math.isfinite(losses[-1]):
            raise NumericsError(f"{problem.name}: the loss of tuning is {losses[-1]} at step {state.step}")
        optimizer.step()
        for group, settings, start in zip(problem.groups, optimizer.param_groups, starts, strict=True):
            _draw_back(group.parameters, start, settings["lr"] * group.decay)
        problem.settle()
        state.step += 1
        if state.step % every == 0 or state.step == options.steps:
            _look(problem, parameters, state, sum(losses) / len(losses), watch)
            losses = []
            ends = state.step == options.steps or state.stops(options.patience)
            is_over = not ends and watch.is_over("look")
            if tuning_checkpoint is not None and (ends or is_over or time.monotonic() - kept_at >= KEEP_SECONDS):
                tuning_checkpoint.save(_kept(parameters, optimizer, state))
                kept_at = time.monotonic()
            if is_over:
                world.count(0)  # the first process has stored the state
                raise watch.ending("look", f"step {state.step} of {options.steps} of {problem.name}")
        progress(state.step, options.steps, f"{problem.name}, held-out loss {state.least:.4g}")
    _go_back(parameters, state)
    problem.settle()
    return state.checks


@torch.no_grad()
def _go_back(parameters: list[nn.Parameter], state: TuningState) -> None:
    for parameter, best in zip(parameters, state.best, strict=True):
        parameter.copy_(best)


@torch.no_grad()
def _draw_back(parameters: Sequence[nn.Parameter], starts: Sequence[Tensor], share: float) -> None:
    for parameter, start in zip(parameters, starts, strict=False):  # without decay there are no starts
        parameter.lerp_(start, share)


def rate_factor(step: int, steps: int) -> float:
    """A short linear rise, then a cosine down to a twentieth."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _look(
    problem: Problem, parameters: list[nn.Parameter], state: TuningState, train: float | None, watch: Watch
) -> None:
    loss = problem.held_out_loss()
    if not math.isfinite(loss):
        raise NumericsError(f"{problem.name}: the held-out loss of tuning is {loss} at step {state.step}")
    if loss < state.least:
        state.best = [parameter.detach().clone() for parameter in parameters]
    state.checks.append(Check(state.step, train, loss))
    watch.finish("look", name=problem.name, **vars(state.checks[-1]))


def _kept(parameters: list[nn.Parameter], optimizer: torch.optim.Adam, state: TuningState) -> dict[str, Tensor]:
    """Everything that `_restore` needs, as tensors."""
    nothing = math.nan
    looks = [[check.step, nothing if check.train is None else check.train, check.held_out] for check in state.checks]
    kept = {"step": torch.tensor(state.step), "checks": torch.tensor(looks, dtype=torch.float64)}
    for index, (parameter, best) in enumerate(zip(parameters, state.best, strict=True)):
        kept |= {f"{index}.now": parameter.detach(), f"{index}.best": best}
        for key, value in optimizer.state[parameter].items():
            kept[f"{index}.{key}"] = value
    return kept


def _restore(
    kept: dict[str, Tensor], parameters: list[nn.Parameter], optimizer: torch.optim.Adam, state: TuningState
) -> None:
    needed = {"step", "checks", *(f"{index}.{key}" for index, _ in enumerate(parameters) for key in ("now", "best"))}
    if missing := sorted(needed - kept.keys()):
        raise CheckpointError(
            f"the state of tuning has no {missing[0]!r}; start over with --force and without --resume"
        )
    state.step = int(kept["step"])
    state.checks = [
        Check(int(step), None if math.isnan(train) else train, held_out)
        for step, train, held_out in kept["checks"].tolist()
    ]
    keys: Any = ("step", "exp_avg", "exp_avg_sq")
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(kept[f"{index}.now"])
        state.best.append(kept[f"{index}.best"].to(parameter.device))
        if f"{index}.exp_avg" in kept:
            # On a CPU and on a GPU (fused) the optimizer's step count is on the device of its parameters.
            optimizer.state[parameter] = {key: kept[f"{index}.{key}"].to(parameter.device) for key in keys}


@contextmanager
def deterministic() -> Iterator[None]:
    """While open, operations use their deterministic form. One without such a form raises RuntimeError."""
    # Makes cuBLAS deterministic. It is read when an operation runs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    more: Any = torch.utils.deterministic
    fills = more.fill_uninitialized_memory
    # With warnings only, attention would not be deterministic: its backward pass checks this setting.
    torch.use_deterministic_algorithms(True, warn_only=False)
    more.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        more.fill_uninitialized_memory = fills
