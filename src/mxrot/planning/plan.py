"""Put a plan together: sizes, memory, time, and what stands in the way."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mxrot.calibration.placement import memory_of, on_disk
from mxrot.calibration.spreading import Room, Spread, room_here
from mxrot.calibration.writing_sizes import WRITING
from mxrot.checkpoint import check_exportable
from mxrot.environment import available_memory, device_name, versions
from mxrot.errors import ConfigError, FamilyError, MxrotError
from mxrot.layers import ModelSize, build_apart
from mxrot.layers.cache_size import CacheSize
from mxrot.models import Family, FolderSource, Kept, find_family, read_config
from mxrot.models.folder import has_no_weights
from mxrot.planning.disk import estimate_disk
from mxrot.planning.memory import MemoryEstimate, estimate_host_memory, estimate_memory, gigabytes
from mxrot.planning.rates import OtherRates, measure_rates
from mxrot.planning.run import Run
from mxrot.planning.seconds import TimeEstimate
from mxrot.planning.shape import ModelShape
from mxrot.planning.sharing import share_of, shared_memory, shared_seconds
from mxrot.quantizing.loading import compute_dtype
from mxrot.quantizing.problems import find_problems, free_memory, memory_problem
from mxrot.quantizing.rotating import config_after
from mxrot.quantizing.shared import check_shared
from mxrot.recipe import Recipe
from mxrot.suited import suited
from mxrot.vllm.verdict import VllmReport, plan_for_vllm

ASSUMED_DTYPE = torch.bfloat16
HOW = "what is to be computed, counted, over how fast this machine was in a run of a few seconds"


@dataclass(frozen=True)
class Machine:
    """What a plan is made for."""

    device: torch.device
    """Where the time is measured, unless another machine has."""
    gpu_bytes: float | None = None
    """Memory of the GPU to plan for; None for that of `device`."""
    other: OtherRates | None = None
    """How fast another machine is that the time is planned for; None for this one."""

    def free_on_gpu(self) -> float | None:
        """Bytes; None where no GPU is known."""
        return free_memory(self.device) if self.gpu_bytes is None else self.gpu_bytes

    def memory_of_gpu(self) -> float | None:
        """Bytes that the GPU has, free or not; None where no GPU is known."""
        return memory_of(self.device) if self.gpu_bytes is None else self.gpu_bytes

    def room(self, wanted: float, processes: int) -> Room | None:
        """For a model that takes the bytes `wanted`; None where no GPU is known. Of a GPU that is not here each process
        has one, beside main memory without end."""
        if self.gpu_bytes is None:
            return room_here(self.device, wanted)
        names = tuple(f"cuda:{number}" for number in range(processes))
        return Room(names, (self.gpu_bytes,) * processes, math.inf)

    @property
    def computes_on_gpu(self) -> bool:
        """Is a GPU planned for?"""
        return self.device.type == "cuda" or self.gpu_bytes is not None

    @property
    def kind(self) -> str:
        """Of the device that the time is for."""
        return self.device.type if self.other is None else self.other.kind


@dataclass(frozen=True)
class Sizes:
    """What is there, before and after."""

    shape: ModelShape
    before: int
    """Bytes of all weights as they are."""
    after: ModelSize
    cache: CacheSize
    """Of keys and values, once it is quantized."""
    unties: bool = False
    """Does a head that was the embedding get weights of its own?"""


@dataclass(frozen=True)
class Needs:
    """What quantizing into a folder takes."""

    cpu: MemoryEstimate
    """Main memory, computing on the CPU."""
    gpu: MemoryEstimate
    """The GPU's memory, computing there."""
    gpu_host: MemoryEstimate
    """Main memory beside it."""
    gpu_kept: MemoryEstimate
    """The GPU's memory where the result stays there, as with `compare`."""
    disk: dict[str, float]
    """Bytes of a disk, by what they are for."""


@dataclass(frozen=True)
class Plan:
    """What quantizing a model by a recipe would take."""

    model: str
    recipe: Recipe
    windows: tuple[int, int] | None
    """Calibration windows of the text and their length; None for a recipe without data."""
    problems: list[str] = field(default_factory=list)
    """Why it would be refused."""
    warnings: list[str] = field(default_factory=list)
    sizes: Sizes | None = None
    """None, like what follows, where the model is of no known family."""
    needs: Needs | None = None
    spread: Spread | None = None
    """How the model that writes text is spread over devices; None where one GPU holds it, or none is known."""
    time: TimeEstimate | None = None
    device: str = "cpu"
    """What the time is for, by name, and by kind: cpu or cuda."""
    kind: str = "cpu"
    processes: int = 1
    """That share the run; memory is that of each."""
    vllm: VllmReport | None = None
    """None where no checkpoint would be written."""

    def as_table(self) -> dict[str, Any]:
        """The plan as `plan --json` writes it."""
        return {
            "model": self.model,
            "recipe": self.recipe.name,
            "recipe_toml": self.recipe.to_toml(),
            "windows": self.windows,
            "processes": self.processes,
            "refused": self.problems,
            "warnings": self.warnings,
            "sites": [] if self.sizes is None else _sites_table(self.sizes.shape),
            "kept": [] if self.sizes is None else kept_table(self.sizes.shape.kept),
            "size": None if self.sizes is None else _size_table(self.sizes),
            "cache": None if self.sizes is None else self.sizes.cache.as_table(),
            "memory": None if self.needs is None else _memory_table(self.needs),
            "text_spread": None if self.spread is None else self.spread.as_table(),
            "disk": None if self.needs is None else {"total": sum(self.needs.disk.values()), "terms": self.needs.disk},
            "seconds": None if self.time is None else _time_table(self.time, self.device, self.kind),
            "vllm": None if self.vllm is None else self.vllm.as_table(),
            "versions": versions(),
        }


def kept_table(kept: Sequence[tuple[Kept, int]]) -> list[dict[str, Any]]:
    """What no recipe quantizes, of how many decoder blocks, and why."""
    return [{"blocks": blocks, "parts": [*one.linears, *one.others], "reason": one.reason} for one, blocks in kept]


def make_plan(
    model: str,
    config_path: Path,
    recipe: Recipe,
    machine: Machine,
    samples: int | None = None,
    seq_len: int | None = None,
    processes: int = 1,
) -> Plan:
    """Plan from a config.json, or a folder with one; no weight is read. The time is measured unless it is refused.

    Where weights lie in the folder, their headers are looked at, and what `quantize` would refuse in them is refused.
    FamilyError where there is no config that can be read. `samples` and `seq_len` replace the recipe's windows.
    """
    config = read_config(config_path)
    given = recipe.calibration.samples if samples is None else samples
    length = recipe.calibration.seq_len if seq_len is None else seq_len
    plan = Plan(model, recipe, None if recipe.is_data_free else (given, length), processes=processes)
    problems = []
    windows = None if recipe.is_data_free else given
    for check in (check_exportable, partial(check_shared, windows=windows, processes=processes)):
        try:
            check(recipe)
        except ConfigError as error:
            problems.append(str(error))
    try:
        family = find_family(config, model)
        source = _source_beside(config_path, model)
        started = time.perf_counter()
        skeleton = build_apart(config)
        building = time.perf_counter() - started
        stored, warnings = _stored_dtype(config, source)
        warnings += [source.passed_over] if source is not None and source.passed_over else []
        recipe, left_out = suited(recipe, family, config)
        warnings += [f"left out of the recipe: {said}" for said in left_out]
    except FamilyError as error:
        return replace(plan, problems=[*problems, str(error)])
    problems += _summarized(list(find_problems(skeleton, family, recipe, model, source)), family)
    try:
        parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        changed = config_after(config, recipe)
        skeleton = skeleton if changed is config else build_apart(changed)
        shape = ModelShape.of(skeleton, family, recipe)
        run = _with_room(Run(shape, recipe, "cpu", stored, given, length), machine, processes)
        problems += _memory_problems(run)
        needs = _needs(run, processes)
        cache = CacheSize.of(config, family, None if recipe.cache is None else recipe.cache.scheme())
        before = (parameters + shape.constants) * stored.itemsize
        sizes = Sizes(shape, before, shape.size_after(stored), cache, changed is not config)
    except (AttributeError, ConfigError):  # a linear that is not there, or is not whole blocks wide: a problem by now
        return replace(plan, problems=problems)
    spread = replace(run, device="cuda").spread
    warnings += _spread(spread) + _short_memory(needs, machine, processes) + _few_tokens(run)
    estimate = None
    if not problems:
        if machine.other is None:
            rates = measure_rates(machine.device, compute_dtype(stored, machine.device), recipe)
        else:
            rates = machine.other.rates
        estimate = shared_seconds(replace(run, device=machine.kind), processes, rates, building)
    return replace(
        plan,
        problems=problems,
        warnings=warnings,
        sizes=sizes,
        needs=needs,
        spread=spread,
        time=estimate,
        device=device_name(machine.device) if machine.other is None else machine.other.device,
        kind=machine.kind,
        vllm=None if problems else plan_for_vllm(skeleton, family, recipe),
    )


def _needs(run: Run, processes: int) -> Needs:
    """Of the first of the processes, which needs most."""

    def needed(estimate: Callable[[Run], MemoryEstimate], run: Run) -> MemoryEstimate:
        return shared_memory(estimate(share_of(run, processes)), estimate(run))

    on_gpu = replace(run, device="cuda")
    kept = needed(estimate_memory, replace(on_gpu, keeps_model=True))
    in_all = needed(estimate_memory, run), needed(estimate_memory, on_gpu), needed(estimate_host_memory, on_gpu)
    return Needs(*in_all, kept, estimate_disk(run))


def _source_beside(config_path: Path, name: str) -> FolderSource | None:
    """The weights of a folder; None for a file, and for a folder that has only a config."""
    return FolderSource(config_path, name) if config_path.is_dir() and not has_no_weights(config_path) else None


def _stored_dtype(config: Any, source: FolderSource | None) -> tuple[torch.dtype, list[str]]:
    """The type of the weights, as the files or else the config says, and a remark where neither does."""
    if source is not None and source.files.holds_weights:
        return source.dtype, []
    named = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    found = getattr(torch, named, None) if isinstance(named, str) else named
    if isinstance(found, torch.dtype):
        return found, []
    return ASSUMED_DTYPE, ["config.json does not name the type of the weights; 16 bits are assumed"]


def _summarized(problems: list[MxrotError], family: Family) -> list[str]:
    """One line for what is wrong in the same way in many blocks."""
    pattern = re.compile(rf"^{re.escape(family.blocks)}\.\d+\.")
    lines: dict[str, list[str]] = {}
    for problem in problems:
        lines.setdefault(pattern.sub(f"{family.blocks}.*.", str(problem)), []).append(str(problem))
    return [alike[0] if len(alike) == 1 else f"{line} ({len(alike)} decoder blocks)" for line, alike in lines.items()]


def _with_room(run: Run, machine: Machine, processes: int) -> Run:
    """The run, and the room that there is for its states, and for the original model as a whole."""
    run = replace(run, gpu_memory=machine.memory_of_gpu())
    if not machine.computes_on_gpu or not run.recipe.runs_whole_original:
        return run
    wanted = replace(run, device="cuda").writing.on_one_device if run.recipe.writes_text else 0.0
    return replace(run, room=machine.room(wanted, processes))


def _memory_problems(run: Run) -> list[str]:
    problem = memory_problem(run.recipe, replace(run, device="cuda").writing, "cuda", run.room)
    return [] if problem is None else [str(problem)]


def _spread(spread: Spread | None) -> list[str]:
    """What is said of a model that writes text on several devices."""
    if spread is None:
        return []
    waiting = spread.bytes_in("disk")
    by_disk = f"; {gigabytes(waiting)} of it will lie in the folder of temporary files ($TMPDIR)" if waiting else ""
    return [f"{spread.said}{by_disk}"]


WAITING = ("hidden states", "hidden states of the original", "outputs of attention and MLP")
"""Terms that may lie on disk."""


def _short_memory(needs: Needs, machine: Machine, processes: int) -> list[str]:
    """What will not fit, though nothing checks it beforehand, and what will lie on disk."""
    found = []
    free = machine.free_on_gpu()
    peak = needs.gpu.peak
    if free is not None and peak.total > free:
        found.append(
            f"the GPU will run out of memory: {gigabytes(peak.total)} at {peak.name!r}, and {gigabytes(free)} are free"
        )
    in_main_memory = needs.gpu_host if machine.computes_on_gpu else needs.cpu
    available = available_memory()
    if available is None or machine.gpu_bytes is not None:
        return found
    taken = {
        stage.name: stage.total * (1 if stage.name == WRITING else processes)  # the first writes for all
        for stage in in_main_memory.stages
    }
    waiting = {
        stage.name: processes * sum(stage.terms.get(name, 0.0) for name in WAITING) for stage in in_main_memory.stages
    }
    if on_disk(processes * max(stage.terms.get("hidden states", 0.0) for stage in in_main_memory.stages), available):
        taken = {name: size - waiting[name] for name, size in taken.items()}
        found.append(
            f"{gigabytes(max(waiting.values()))} of states between decoder blocks will lie on disk, in the folder of "
            "temporary files ($TMPDIR)"
        )
    peak_at = max(taken, key=lambda name: taken[name])
    if taken[peak_at] > available:
        found.append(
            f"this machine will run out of memory: {gigabytes(taken[peak_at])} at {peak_at!r}, "
            f"and {gigabytes(available)} are available"
        )
    return found


def _few_tokens(run: Run) -> list[str]:
    """A Hessian of fewer tokens than channels is not of full rank: damping alone decides about the rest."""
    tokens = run.tokens
    every = (site for sites in run.shape.blocks for site in sites)
    widest = max((site.inputs for site in every if site.recipe.rounding.requirements.hessian), default=0)
    if tokens >= widest:
        return []
    return [
        f"{tokens} calibration tokens are fewer than the {widest} inputs of the widest linear, whose Hessian is not of "
        "full rank; take more --samples or --seq-len"
    ]


def _sites_table(shape: ModelShape) -> list[dict[str, Any]]:
    return [
        {
            "site": found.site.name,
            "linears": {name: [rows, found.inputs] for name, rows in zip(found.site.linears, found.rows, strict=True)},
            "blocks": count,
            "weights": count * found.weights,
            "scheme": found.scheme.spelled,
            "bits_per_weight": found.size.bits_per_weight,
        }
        for found, count in shape.site_counts()
    ]


def _size_table(sizes: Sizes) -> dict[str, Any]:
    after = sizes.after
    bits = {
        "bits_per_weight": after.bits_per_weight,
        "transform_bits_per_weight": after.transform_bits_per_weight,
        "total_bytes": after.total_bytes,
    }
    return {"parameters": sizes.shape.parameters, "before_bytes": sizes.before, "after": {**after.as_table(), **bits}}


def _memory_table(needs: Needs) -> dict[str, Any]:
    estimates = {"cpu": needs.cpu, "gpu": needs.gpu, "gpu_host": needs.gpu_host, "gpu_kept": needs.gpu_kept}
    return {name: _estimate_table(estimate) for name, estimate in estimates.items()}


def _estimate_table(estimate: MemoryEstimate) -> dict[str, Any]:
    stages = [
        {
            "stage": stage.name,
            "bytes": round(stage.total),
            "terms": {name: round(value) for name, value in stage.terms.items()},
        }
        for stage in estimate.stages
    ]
    return {"peak_bytes": round(estimate.peak.total), "peak_at": estimate.peak.name, "stages": stages}


def _time_table(estimate: TimeEstimate, device: str, kind: str) -> dict[str, Any]:
    terms = {name: round(value, 2) for name, value in estimate.terms.items()}
    return {
        "device": device,
        "kind": kind,
        "total": round(estimate.total, 2),
        "terms": terms,
        "estimated_by": HOW,
        "rates": estimate.rates.as_table(),
    }
