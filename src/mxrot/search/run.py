"""A search from its start to its recipe.

One pass quantizes the model by the recipe, and rounds each site in every other way as well (roundings.py). Then sites
of the model in memory are raised and put back, and each mixture is measured (climb.py, meter.py). The result is
quantized once more from the original, as `mxrot quantize` does by the written recipe, and measured on windows that the
search has not seen.

Several processes quantize side by side, and share other roundings and measurements (shares.py). Each figure has the
same bits as in one process, and so has the recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxrot import api
from mxrot.checkpoint.fingerprint import fingerprint_of
from mxrot.errors import ConfigError
from mxrot.layers import build_apart
from mxrot.models import FolderSource, find_model
from mxrot.progress import Progress, silent
from mxrot.quantizing.problems import find_problems
from mxrot.ranks import current
from mxrot.recipe import Recipe
from mxrot.report.work_folder import WorkFolder
from mxrot.search.bits import Cell, Costs, Limits, Mixture
from mxrot.search.choices import Choice, base_choice, everywhere
from mxrot.search.climb import Alone, Climb
from mxrot.search.found import BASE, QUANTIZED, SEARCHED, Found, Kl, Measured, Row
from mxrot.search.job import SearchJob
from mxrot.search.kept import KeptSearch
from mxrot.search.meter import Meter
from mxrot.search.written import mixture_recipe, raised_runs
from mxrot.text import Windows
from mxrot.tokenizing import Calibration


def search(
    model: str,
    recipe: Recipe,
    choices: Sequence[Choice],
    limits: Limits,
    *,
    calib: Any = "demo",
    samples: int | None = None,
    texts: Any = "demo",
    windows: int = 8,
    seq_len: int = 2048,
    seed: int = 0,
    device: str | None = None,
    work: Path,
    resume: bool = False,
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> Found:
    """The best measured mixture under `limits`. Each of `texts` gives `windows` windows to search with, and the next as
    many to judge by.

    With `resume` the search continues from the folder `work`, under the same limits or others. Joined processes
    (mxrot.ranks) share the work, and all return the same result. ConfigError for what cannot be searched, before any
    weight is read.
    """
    world = current()
    folder = find_model(model)
    source = FolderSource(folder, model)
    with world.first_goes_ahead():
        costs = _checked(source, recipe, choices, limits, world.size)
    read = api.read_texts(folder, texts, windows=2 * windows, seq_len=seq_len, progress=progress)
    parts = _halves(read, windows)
    calibration = api.calibrate(folder, recipe, calib, samples, seq_len, progress)
    where = torch.device(device or api.default_device())
    with WorkFolder.opened(work, world) as place:
        hashes = world.hand_out({} if world.rank else place.hashes(folder, progress))
        key = {
            "made": fingerprint_of(hashes, {}, calibration.recipe, calibration.windows, where, seed),
            "choices": sorted(choice.spelled for choice in choices),
            "measured": [hashlib.sha256(ids.numpy().tobytes()).hexdigest() for ids in parts],
        }
        kept = KeptSearch(place.folder, key, resume, world)
        if resume and kept.measured:
            announce(f"{len(kept.measured)} measurements were made before, and are taken from {kept.folder}")
        job = SearchJob(model, source, recipe, costs, limits, calibration, where, seed, kept, progress)
        job.quantize_all_ways()
        found = _found(job, read, parts)
        world.count(0)  # no process needs the folder any more
        return found


def _checked(source: FolderSource, recipe: Recipe, choices: Sequence[Choice], limits: Limits, processes: int) -> Costs:
    """The costs of every raise. ConfigError for what cannot be searched, before any weight is read."""
    if recipe.trains_rotations and processes > 1:
        raise ConfigError(
            f"recipe {recipe.name}: {processes} processes do not share the training of rotations; set rotation.steps = "
            "0, or start one process"
        )
    if recipe.tuning is not None:
        raise ConfigError(
            f"recipe {recipe.name}: search raises what is rounded once, and this recipe is tuned; search with --set "
            "tuning=none, and put [tuning] into the recipe that is written"
        )
    if recipe.choice is not None:
        raise ConfigError(
            f"recipe {recipe.name}: search quantizes with one recipe, and this one has candidates; search with --set "
            "choice=none, or with what its choice was (run.json of a quantized model)"
        )
    family = source.family
    if family.experts is not None:
        raise ConfigError(
            f"{source.name}: search does not raise experts, as in family {family.name}; write [[override]] yourself"
        )
    skeleton = build_apart(source.config)
    for problem in find_problems(skeleton, family, recipe, source.name, source):
        raise problem
    for choice in choices:
        try:
            for problem in find_problems(skeleton, family, everywhere(recipe, choice), source.name):
                raise problem
        except ConfigError as error:
            raise ConfigError(f"--choices {choice.spelled}: {error}") from error
    costs = Costs.of(recipe, choices, family, skeleton, source.dtype)
    if not costs.choices:
        raise ConfigError(f"recipe {recipe.name}: none of the choices takes more bits than it has; raise to others")
    counts_inputs = limits.weights is None
    for option, most, base in (
        ("--bits", limits.inputs if counts_inputs else limits.weights, costs.base[counts_inputs]),
        ("--input-bits", None if counts_inputs else limits.inputs, costs.base.inputs),
    ):
        if most is not None and most < base:
            raise ConfigError(
                f"{option} {most:g}: recipe {recipe.name} takes {base:.3f} with nothing raised; give more, or another "
                "--recipe"
            )
    return costs


def _halves(read: Sequence[Windows], count: int) -> list[Tensor]:
    """Token windows to search with [W, T], at most `count` of each text, and others to judge by, if there are any."""
    pairs = [(part.ids[: min(count, -(-len(part.ids) // 2))], part.ids) for part in read]
    seen = torch.cat([first for first, _ in pairs])
    unseen = torch.cat([whole[len(first) :] for first, whole in pairs])
    return [seen, unseen] if len(unseen) else [seen]


def _found(job: SearchJob, read: Sequence[Windows], parts: Sequence[Tensor]) -> Found:
    costs = job.costs
    originals = job.originals(parts)
    raised = job.raised_model()
    about = 2 * (len(costs.blocks) + (len(costs.kinds) + 1) * len(costs.choices))
    meter = Meter(raised, originals[0], "seen", job.kept, job.progress, about)
    alone = Alone.measure(costs, meter)
    best = _best(job, meter, alone)
    judge = Meter(raised, originals[1], "unseen", job.kept, job.progress, 3) if len(originals) > 1 else None
    rows = _rows(costs, {BASE: {}, SEARCHED: best}, meter, judge)
    rows += _rows(costs, {f"all in {one.spelled}": costs.all_of(one) for one in costs.choices}, meter, judge)
    measured = [
        Measured(mixture, stage, costs.bits(mixture), Kl(tuple(meter.values(mixture, stage))))
        for mixture, stage in [*meter.stages.values()]
    ]
    del raised, meter, judge  # frees the memory of a model
    bits = costs.bits(best)
    recipe = mixture_recipe(_with_windows(job.recipe, job.calibration), best, costs.kinds, bits, job.name)
    if best:
        seen, *unseen = job.as_quantized(recipe, originals)
        rows.insert(2, Row(QUANTIZED, bits, seen, unseen[0] if unseen else None))
    kinds = {(kind, choice): costs.bits(costs.all_of(choice, kind=kind)) for kind, choice in alone.kinds}
    tables = raised_runs(best, costs.kinds)
    return Found(job.name, recipe, job.limits, base_choice(job.recipe), tables, rows, alone, kinds, measured, read)


def _best(job: SearchJob, meter: Meter, alone: Alone) -> dict[Cell, Choice]:
    """The measured mixture with the least KL within the limits."""
    costs, limits = job.costs, job.limits
    starts: list[dict[Cell, Choice]] = [{}, *(costs.all_of(choice) for choice in costs.choices)]
    admitted = [mixture for mixture in starts if limits.admit(costs.bits(mixture))]
    start: Mixture = min(admitted, key=lambda mixture: meter.kl(mixture, "raised"))
    Climb(costs, limits, meter, alone.believed(costs)).run(start)
    measured = [mixture for mixture, _ in meter.stages.values() if limits.admit(costs.bits(mixture))]
    best: Mixture = min(measured, key=lambda mixture: (meter.kl(mixture, "raised"), costs.bits(mixture)))
    return dict(best)


def _rows(costs: Costs, mixtures: Mapping[str, Mixture], meter: Meter, judge: Meter | None) -> list[Row]:
    """One row per mixture, by its label."""
    seen = meter.values_of(mixtures)
    unseen = {} if judge is None else judge.values_of(mixtures)
    return [
        Row(
            label,
            costs.bits(mixture),
            Kl(tuple(seen[label])),
            Kl(tuple(unseen[label])) if label in unseen else None,
        )
        for label, mixture in mixtures.items()
    ]


def _with_windows(recipe: Recipe, calibration: Calibration) -> Recipe:
    """The recipe with the requested number of calibration windows."""
    told = calibration.description
    if told is None:
        return recipe
    choice = replace(recipe.calibration, samples=told["windows_asked"], seq_len=told["seq_len"])
    return replace(recipe, calibration=choice)
