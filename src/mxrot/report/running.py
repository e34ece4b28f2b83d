"""The runs of a comparison. Finished runs are found by their keys, and the others are made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.calibration import ONE, World
from mxrot.checkpoint.fingerprint import fingerprint_of
from mxrot.environment import device_name, versions
from mxrot.errors import CheckpointError, ConfigError, FamilyError, NumericsError, OutOfMemoryError
from mxrot.failures import machine_failure
from mxrot.progress import Progress
from mxrot.progress.steps import Steps
from mxrot.report.checkpoints import GivenCheckpoint
from mxrot.report.costs import measuring_costs, quantizing_costs
from mxrot.report.rows import ComparedRow, Run
from mxrot.report.trials import Trials, let_go
from mxrot.report.work_folder import Key, WorkFolder
from mxrot.run_time_cache import RunTimeCache
from mxrot.tokenizing import Calibration

_OWN_ERRORS = (ConfigError, FamilyError, NumericsError)
"""Errors of one recipe on a model. The other recipes can still be compared."""


@dataclass(frozen=True)
class Job:
    """One run to make."""

    label: str
    calibration: Calibration | None
    """The calibration. None for the original."""
    seed: int
    key: Key
    cache: RunTimeCache | None = None
    """The cache that replaces the model's own."""
    checkpoint: GivenCheckpoint | None = None
    """The checkpoint that is read instead of quantizing."""


class Comparison:
    """The finished and unfinished runs of a comparison. The processes of a `world` share the unfinished ones, each with
    its own model in memory."""

    def __init__(
        self,
        trials: Trials,
        work: WorkFolder,
        original: Job,
        jobs: Sequence[Job],
        resume: bool,
        progress: Progress,
        world: World = ONE,
    ) -> None:
        self._trials, self._work, self._original, self._jobs, self._world = trials, work, original, jobs, world
        self._found: dict[int, Run | str] = {}
        for number, job in enumerate([original, *jobs] if not world.rank else []):  # the first finds and cleans up
            known = work.find(job.key) if resume else None
            if known is not None:
                self._found[number] = known
            elif not resume:
                work.forget(job.key)
        self._found = world.hand_out(self._found)
        self.taken = len(self._found)
        left = [number for number in range(1, len(jobs) + 1) if number not in self._found]
        self._own = left[world.rank :: world.size]
        self._steps = Steps(progress, self._costs())

    def _costs(self) -> list[list[float]]:
        """The costs of the original, and of each remaining job of this process, to quantize and to measure."""
        measuring = measuring_costs(self._trials.read, self._trials.examples)
        quantizing = [[0.0] if job.calibration is None else quantizing_costs(job.calibration) for job in self._jobs]
        pairs = [
            [costs, measuring] if number in self._own else [[0.0], [0.0]] for number, costs in enumerate(quantizing, 1)
        ]
        return [measuring if self._needs_original else [0.0], *(costs for pair in pairs for costs in pair)]

    @property
    def _needs_original(self) -> bool:
        """True if the original must run. This also holds if its run is known but another job needs its states."""
        is_known = 0 in self._found or self._world.rank > 0
        return not is_known or (bool(self._own) and not self._trials.has_states())

    def rows(self) -> list[ComparedRow]:
        """The rows of the original and of each recipe."""
        if self._needs_original:
            told = self._steps.of(0, f"perplexity of {self._original.label}")
            self._keep(0, self._original, self._trials.original(told))
            let_go()
        if self._world.size > 1:
            self._share()
        original = self._found[0]
        assert isinstance(original, Run)
        rows = [ComparedRow(self._original.label, (original,))]
        for label in dict.fromkeys(job.label for job in self._jobs):
            numbers = [number for number, job in enumerate(self._jobs, 1) if job.label == label]
            rows.append(self._row(label, numbers, original))
        return rows

    def _share(self) -> None:
        """Make the runs of this process, and take over those of the others."""
        for number in self._own:
            self._run(number)
            let_go()
        made = {number: self._found[number] for number in (0, *self._own) if number in self._found}
        told = {number: found if isinstance(found, str) else found.to_json() for number, found in made.items()}
        own = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
        for rank, given in enumerate(self._world.gather(own)):
            for number, found in json.loads(bytes(given.cpu().tolist())).items():
                if rank != self._world.rank and (int(number) or not rank):
                    self._found[int(number)] = found if isinstance(found, str) else Run.from_json(found)

    def _row(self, label: str, numbers: Sequence[int], original: Run) -> ComparedRow:
        runs: list[Run] = []
        for number in numbers:
            if _are_alike(runs):
                break
            if number not in self._found:
                self._run(number)
                let_go()
            found = self._found[number]
            if isinstance(found, str):
                return ComparedRow(label, tuple(runs), original, found)
            runs.append(found)
        given = self._jobs[numbers[0] - 1].checkpoint
        folder = None if given is None else str(given.folder)
        return ComparedRow(label, tuple(runs), original, checkpoint=folder, is_alike=_are_alike(runs))

    def _run(self, number: int) -> None:
        """Make one run, or record why it is not possible."""
        job = self._jobs[number - 1]
        told = self._steps.of(2 * number - 1, job.label), self._steps.of(2 * number, f"perplexity of {job.label}")
        try:
            self._keep(number, job, self._trials.made(job.calibration, job.seed, job.cache, *told, job.checkpoint))
        except _OWN_ERRORS as error:
            self._keep(number, job, str(error))
        except CheckpointError as error:
            if job.checkpoint is None:  # it is the original: nothing can be compared
                raise
            self._keep(number, job, str(error))
        except Exception as error:
            lacked = machine_failure(error)
            if not isinstance(lacked, OutOfMemoryError):
                raise
            self._found[number] = str(lacked)  # not kept: later there may be more memory

    def _keep(self, number: int, job: Job, found: Run | str) -> None:
        self._found[number] = found
        self._work.keep(job.key, found)


def key_of(
    hashes: dict[str, str],
    protocol: Key,
    calibration: Calibration | None,
    device: str,
    seed: int,
    cache: RunTimeCache | None = None,
    fitted_on: Tensor | None = None,
    checkpoint: dict[str, str] | None = None,
) -> Key:
    """Everything that decides the figures of a run. `checkpoint` holds the file hashes of a checkpoint."""
    if calibration is None:
        made: Key = {"model": hashes, "device": device_name(torch.device(device)), "versions": versions()}
    else:
        made = fingerprint_of(hashes, {}, calibration.recipe, calibration.windows, device, seed)
    if checkpoint is not None:
        made["checkpoint"] = checkpoint
    if cache is None:
        return {"made": made, "measured": protocol}
    kept = vars(cache) | {"fitted_on": sha256_of_ids(fitted_on) if cache.needs_text else None}
    return {"made": made, "cache": kept, "measured": protocol}


def sha256_of_ids(windows: Tensor | None) -> str | None:
    """The SHA-256 of token windows. None without any."""
    return None if windows is None else hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _are_alike(runs: Sequence[Run]) -> bool:
    """True if several seeds all gave the same figures."""
    return len(runs) > 1 and all(runs[0].measures_as(run) for run in runs[1:])
