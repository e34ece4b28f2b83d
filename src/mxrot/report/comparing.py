"""A comparison of several recipes on one model, in memory, one model at a time.

Every run has a key of all that decides its figures. With a work folder, runs that an earlier comparison has finished
under the same key are taken from there.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mxrot import api
from mxrot.calibration import World
from mxrot.errors import ConfigError, MxrotError
from mxrot.evaluation import KeptOriginal
from mxrot.layers import build_apart
from mxrot.models import FolderSource, find_model
from mxrot.progress import Progress, silent
from mxrot.quantizing.problems import find_problems, weight_problems
from mxrot.ranks import current
from mxrot.recipe import Recipe
from mxrot.report.checkpoints import given_checkpoints
from mxrot.report.rows import ComparedRow, in_order
from mxrot.report.running import Comparison, Job, key_of
from mxrot.report.trials import Trials
from mxrot.report.work_folder import Key, WorkFolder
from mxrot.run_time_cache import RunTimeCache
from mxrot.sections import CalibrationChoice
from mxrot.text import Windows, load_texts
from mxrot.tokenizing import Calibration, fitting_windows

_TYPE_NAMES = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32", torch.float64: "FP64"}


def compare_recipes(
    model: str,
    recipes: Sequence[Recipe],
    *,
    calib: Any = "demo",
    samples: int | None = None,
    texts: Any = "demo",
    windows: int | None = None,
    seq_len: int = 2048,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    kl_windows: int | None = None,
    device: str | None = None,
    prompt: str | None = None,
    tasks: dict[str, Any] | None = None,
    limit: int | None = None,
    caches: Sequence[RunTimeCache] = (),
    checkpoints: Sequence[str] = (),
    work: Path | None = None,
    resume: bool = False,
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> list[ComparedRow]:
    """The original model, then the model quantized by each recipe: one row each, the best first, recipes that cannot be
    used last.

    Each recipe runs with each of `seeds` (by default with `seed`). If two seeds give the same figures to the last bit,
    the recipe does not depend on chance, and the other seeds are not run. KL from the original is measured on the first
    `kl_windows` of each text, by default on all; 0 turns it off. `tasks` are those of `evaluation.load_tasks`, and
    `limit` takes the first examples of each. With a `prompt`, each row's `extra["generated"]` is the model's
    continuation of it.

    With `caches`, the original is measured once more with each cache, and each recipe with each cache in place of its
    own. Ratios and KL remain relative to the original with its own cache. Fitted transforms of caches are fitted on
    `calib`.

    Finished runs are kept in the folder `work`, if given, and reused with `resume`; `announce` receives their number.
    Joined processes (mxrot.ranks) share the runs. Each process has one model in memory at a time, and beside a
    quantized one the head of the original, for KL.

    `checkpoints` are folders or ids of checkpoints of this model that mxrot has written. Each is read and measured in
    the same way, once, with the seed that made it. The row of a damaged checkpoint has the reason.

    Errors of the model itself, of the texts and of the machine are raised. Errors of a recipe are in its row. If no
    recipe can be used, the error is raised before any weight is read.
    """
    _check_names(recipes)
    folder = find_model(model)
    source = FolderSource(folder, model)
    problems = _problems(source, recipes)
    _check_caches(source, recipes, caches, checkpoints)
    given = given_checkpoints(checkpoints, _vocabulary(source), [recipe.name for recipe in recipes])
    if recipes and not given and len(problems) == len(recipes):
        raise _of_all(problems)
    read = api.read_texts(folder, texts, windows=windows, seq_len=seq_len, progress=progress)
    able = [recipe for recipe in recipes if recipe.name not in problems]
    calibrations = _calibrations(folder, able, calib, samples, seq_len, progress)
    is_fitted = any(cache.needs_text for cache in caches)
    fitted_on = fitting_windows(folder, calib, seq_len, progress=progress) if is_fitted else None
    device = device or api.default_device()
    world = current()
    with _work_place(work, world) as place:
        with world.first_goes_ahead():
            folders = (folder, *(one.folder for one in given))
            hashes, *own = [{} if work is None else place.hashes(each, progress) for each in folders]
        protocol = _protocol(read, kl_windows, tasks, limit, prompt)
        original = Job(_TYPE_NAMES[source.dtype], None, 0, key_of(hashes, protocol, None, device, 0))
        what = _with_caches(original.label, calibrations, caches, list(seeds or [seed]))
        jobs = [
            Job(label, one, each, key_of(hashes, protocol, one, device, each, cache, fitted_on), cache)
            for label, one, each, cache in what
        ]
        jobs += [
            Job(label, None, 0, key_of(hashes, protocol, None, device, 0, cache, fitted_on, files), cache, one)
            for one, files in zip(given, own, strict=True)
            for label, cache in _under(one.label, caches)
        ]
        kept = None if kl_windows == 0 else KeptOriginal(source, place.states(original.key, world.rank), kl_windows)
        trials = Trials(folder, source.dtype, device, read, kept, tasks or {}, limit, prompt, fitted_on)
        comparison = Comparison(trials, place, original, jobs, resume, progress, world)
        if resume and comparison.taken:
            announce(f"{comparison.taken} of {1 + len(jobs)} runs were finished before, and are taken from {work}")
        rows = comparison.rows()
        world.count(0)  # no process needs the states any more
        place.drop_states()
    rows += [ComparedRow(name, reason=str(error)) for name, error in problems.items()]
    spelled = {recipe.name: recipe.to_toml() for recipe in recipes}
    spelled |= {job.label: job.checkpoint.recipe.to_toml() for job in jobs if job.checkpoint is not None}
    spelled |= {job.label: spelled[job.calibration.recipe.name] for job in jobs if job.calibration is not None}
    return in_order([replace(row, recipe_toml=spelled.get(row.recipe)) for row in rows])


@contextmanager
def _work_place(work: Path | None, world: World) -> Iterator[WorkFolder]:
    """The given folder, or a temporary one."""
    if work is not None:
        with WorkFolder.opened(work, world) as place:
            yield place
        return
    with tempfile.TemporaryDirectory(prefix="mxrot-compare-") as made:
        yield WorkFolder(Path(made))


def _check_names(recipes: Sequence[Recipe]) -> None:
    """ConfigError if two recipes have the same name, because their rows could not be distinguished."""
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two recipes have the name {name!r}; change `name` in the file of one")


def _problems(source: FolderSource, recipes: Sequence[Recipe]) -> dict[str, MxrotError]:
    """The reasons why recipes cannot quantize the model, by name. Errors of the model itself are raised."""
    skeleton = build_apart(source.config)
    for problem in weight_problems(skeleton, source.name, source):
        raise problem
    first = {recipe.name: next(find_problems(skeleton, source.family, recipe, source.name), None) for recipe in recipes}
    return {name: problem for name, problem in first.items() if problem is not None}


def _of_all(problems: dict[str, MxrotError]) -> MxrotError:
    """The error if no recipe can be used: the common one, or a list of all."""
    said = {str(problem): problem for problem in problems.values()}
    if len(said) == 1:
        return next(iter(said.values()))
    return ConfigError("no recipe can be taken: " + "; ".join(f"{name}: {said}" for name, said in problems.items()))


def _calibrations(
    folder: Path, recipes: Sequence[Recipe], calib: Any, samples: int | None, seq_len: int, progress: Progress
) -> list[Calibration]:
    """One calibration per recipe. Recipes that read the same windows share them."""
    if not all(recipe.is_data_free for recipe in recipes):
        calib = load_texts(calib, "calibration")
    known: dict[tuple[CalibrationChoice, bool], Calibration] = {}
    found = []
    for recipe in recipes:
        alike = (recipe.calibration, recipe.is_data_free)
        if alike not in known:
            known[alike] = api.calibrate(folder, recipe, calib, samples, seq_len, progress)
        read = known[alike]
        found.append(replace(read, recipe=replace(recipe, calibration=read.recipe.calibration)))
    return found


def _with_caches(
    original: str, calibrations: Sequence[Calibration], caches: Sequence[RunTimeCache], seeds: Sequence[int]
) -> Iterator[tuple[str, Calibration | None, int, RunTimeCache | None]]:
    """The runs to make: label, calibration, seed and cache of each."""
    for cache in caches:
        yield f"{original} KV {cache.label}", None, 0, cache
    for one in calibrations:
        for label, chosen in _under(one.recipe.name, caches):
            yield from ((label, one, seed, chosen) for seed in seeds)


def _under(name: str, caches: Sequence[RunTimeCache]) -> Iterator[tuple[str, RunTimeCache | None]]:
    """The label and the cache of a model with each cache, or with its own if none is given."""
    for cache in caches:
        yield f"{name} KV {cache.label}", cache
    if not caches:
        yield name, None


def _vocabulary(source: FolderSource) -> int:
    return int(source.config.get_text_config().vocab_size)


def _check_caches(
    source: FolderSource, recipes: Sequence[Recipe], caches: Sequence[RunTimeCache], checkpoints: Sequence[str]
) -> None:
    """ConfigError for caches that the model cannot have, or that would be fitted to quantized models."""
    for cache in caches:
        for problem in cache.problems(source.config, source.family, source.name):
            raise problem
        if cache.needs_text and checkpoints:
            raise ConfigError("--kv-transform second-moment: is fitted to the original only; leave out --checkpoints")
        if cache.needs_text and recipes:
            raise ConfigError(
                "--kv-transform second-moment: is fitted to the original only; take --recipes none, or set "
                f'cache.transform = "second_moment" in recipe {recipes[0].name}'
            )


def _protocol(
    read: Sequence[Windows], kl_windows: int | None, tasks: dict[str, Any] | None, limit: int | None, prompt: str | None
) -> Key:
    """The measurements, and the tokens that they are made on."""
    return {
        "texts": {part.text.name: hashlib.sha256(part.ids.numpy().tobytes()).hexdigest() for part in read},
        "shapes": {part.text.name: list(part.ids.shape) for part in read},
        "kl_windows": kl_windows,
        "tasks": sorted(tasks or {}),
        "limit": limit,
        "prompt": prompt,
    }
