"""What benchmarks/everywhere.py is to measure: models, windows and recipes, and the tasks they come to.

Everything that can be refused is refused here, before any weight is read: a recipe that a model cannot have, a text
that is calibrated on and measured on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from task_queue import Task
from torch import Tensor

import mxrot
from mxrot import api
from mxrot.checkpoint.fingerprint import hash_model
from mxrot.commands.options import chosen_recipe
from mxrot.environment import device_name, versions
from mxrot.errors import ConfigError, MxrotError
from mxrot.kernels.choices import kernel_choices
from mxrot.layers import build_apart
from mxrot.models import FolderSource, find_model, read_config
from mxrot.quantizing.problems import find_problems
from mxrot.recipe import Recipe
from mxrot.text import Text, load_texts, mixed_windows, read_windows
from mxrot.tokenizing import reader_for

OWN = "own"
"""The calibration that the model writes."""


@dataclass(frozen=True)
class Job:
    """One recipe with one seed on one model after one calibration; after all of them, if it reads no text."""

    model: str
    calibrations: tuple[str, ...]
    recipe: str
    seed: int
    key: str
    """SHA-256 of all that decides its figures, but for the code."""
    is_data_free: bool

    @property
    def name(self) -> str:
        text = "no text" if self.is_data_free else self.calibrations[0]
        return f"{self.model}, {text}, {self.recipe}, seed {self.seed}"


@dataclass(frozen=True)
class Model:
    """One model as it was found, and its windows, which lie in a file."""

    name: str
    folder: Path
    files: dict[str, str]
    """SHA-256 of each."""
    windows: Path
    digests: dict[str, str]
    """SHA-256 of token windows by `text NAME` and `calibration NAME`."""


class Plan:
    """The jobs, and what they need."""

    def __init__(
        self,
        options: argparse.Namespace,
        place: Path,
        device: torch.device,
        models: Sequence[Model],
        recipes: dict[str, Recipe],
        calibrations: Sequence[str],
        texts: Sequence[str],
    ) -> None:
        self._options, self._place, self._device = options, place, device
        self._models = {model.name: model for model in models}
        self._recipes, self._calibrations, self._texts = recipes, tuple(calibrations), list(texts)
        self.base: str = options.base
        self.refused = {
            (model.name, label): str(problem) for model in models for label, problem in refusals(model, recipes).items()
        }
        self.jobs = [
            job
            for model in models
            for label in recipes
            if (model.name, label) not in self.refused
            for job in self._jobs_of(model, label)
        ]
        self.description: dict[str, Any] = {
            "models": {model.name: {"files": model.files, "windows": model.digests} for model in models},
            "recipes": {label: recipe.to_toml() for label, recipe in recipes.items()},
        }

    def labels(self) -> Iterator[tuple[str, str, str]]:
        """Model, calibration and recipe of each row."""
        for model in self._models:
            for calibration in self._calibrations:
                yield from ((model, calibration, label) for label in self._recipes)

    def _jobs_of(self, model: Model, label: str) -> Iterator[Job]:
        """A recipe without text is measured once a seed, and stands after each calibration."""
        is_data_free = self._recipes[label].is_data_free
        for chosen in [self._calibrations] if is_data_free else [(one,) for one in self._calibrations]:
            for seed in self._options.seeds:
                key = self._key(model, None if is_data_free else chosen[0], self._recipes[label], seed)
                yield Job(model.name, chosen, label, seed, key, is_data_free)

    def _key(self, model: Model, calibration: str | None, recipe: Recipe, seed: int) -> str:
        read: Any = None if calibration is None else model.digests.get(f"calibration {calibration}")
        measured = {name: digest for name, digest in model.digests.items() if name.startswith("text ")}
        key = {
            **self._machine(),
            "model": model.files,
            "recipe": recipe.to_toml(),
            "calibration": self._own_size() if calibration == OWN else read,
            "seed": seed,
            "measured": measured,
        }
        return digest_of(key)

    def _machine(self) -> dict[str, Any]:
        return {"device": device_name(self._device), "kernels": kernel_choices(self._device), "versions": versions()}

    def _own_size(self) -> list[Any]:
        return [OWN, self._options.samples, self._options.calib_seq_len or self._options.seq_len]

    def tasks(self, jobs: Sequence[Job]) -> list[Task]:
        """What these jobs need, each once, and then themselves."""
        tasks: dict[str, Task] = {}
        last = []
        for job in jobs:
            model = self._models[job.model]
            shared = self._told(model)
            states = f"{job.model}, original"
            tasks.setdefault(states, Task(states, shared | {"kind": "states"}))
            needs, own = [states], {}
            if OWN in job.calibrations and not job.is_data_free:
                path = self._own_path(model, job.seed)
                own = {"own": str(path)}
                if not path.exists():
                    needs.append(f"{job.model}, its own text, seed {job.seed}")
                    size = {"samples": self._own_size()[1], "seq_len": self._own_size()[2], "seed": job.seed}
                    tasks.setdefault(needs[-1], Task(needs[-1], shared | own | size | {"kind": "own text"}))
            toml = self._recipes[job.recipe].to_toml()
            chosen = {"recipe": toml, "label": job.recipe, "seed": job.seed, "calibration": job.calibrations[0]}
            last.append(Task(job.name, shared | own | chosen | {"kind": "recipe"}, tuple(needs)))
        return [*tasks.values(), *last]

    def _told(self, model: Model) -> dict[str, Any]:
        """What every task of a model is told."""
        tokens = api.EVALUATION_TOKENS.get(self._device.type, 2048)
        return {
            "folder": str(model.folder),
            "windows": str(model.windows),
            "texts": self._texts,
            "states": str(self._place / f"states-{digest_of(model.name)[:12]}"),
            "batch": max(1, tokens // self._options.seq_len),
            "device": self._device.type,
        }

    def _own_path(self, model: Model, seed: int) -> Path:
        """Kept with the results: what was written on a GPU need not be written again the same."""
        key = [self._machine(), model.files, self._own_size(), seed, code_digest()]
        return Path(self._options.work) / f"own-{digest_of(key)[:16]}.safetensors"


def make_plan(options: argparse.Namespace, place: Path, device: torch.device) -> Plan:
    """Everything looked up, read and checked; ConfigError and DataError for what cannot be taken."""
    recipes = chosen_recipes(options)
    read = load_texts(options.texts, "evaluation")
    given = [name for name in options.calibrations if name != OWN]
    calibrations = load_texts(given, "calibration") if given else []
    check_apart(read, calibrations)
    needs_text = not all(recipe.is_data_free for recipe in recipes.values())
    models = [found_model(spec, read, calibrations if needs_text else [], options, place) for spec in options.models]
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"--models: two have the same name among {', '.join(names)}; write NAME=FOLDER")
    named = iter(text.name for text in calibrations)
    order = [OWN if name == OWN else next(named) for name in options.calibrations]
    return Plan(options, place, device, models, recipes, order, [text.name for text in read])


def chosen_recipes(options: argparse.Namespace) -> dict[str, Recipe]:
    """By their labels, the base first if it is not named; ConfigError if two have one label."""
    found: dict[str, Recipe] = {}
    for label, name, *changes in [*([one, one] for one in options.recipes), *map(checked_variant, options.variant)]:
        if label in found:
            raise ConfigError(f"two recipes are called {label!r}; give one of them another name")
        found[label] = chosen_recipe(name, changes)
    return found if options.base in found else {options.base: chosen_recipe(options.base, [])} | found


def checked_variant(words: list[str]) -> list[str]:
    if len(words) < 2 or any("=" not in word for word in words[2:]):
        raise ConfigError(f"--variant {' '.join(words)}: expected NAME RECIPE KEY=VALUE ...")
    return words


def check_apart(read: Sequence[Text], calibrations: Sequence[Text]) -> None:
    """ConfigError for a text that is measured on and calibrated on; the one that comes along has two parts."""
    for text in read:
        for other in calibrations:
            if text.digest == other.digest:
                raise ConfigError(f"text {text.name} is calibration {other.name}; measure on another text")


def found_model(
    spec: str, read: Sequence[Text], calibrations: Sequence[Text], options: argparse.Namespace, place: Path
) -> Model:
    """A model, and the windows that it reads: of each text evenly spaced ones, at places that are always the same."""
    name, equals, named = spec.partition("=")
    given = named if equals and not Path(spec).exists() else spec
    folder = find_model(given)
    name = name if given == named and equals else (Path(given).name or given)
    reader = reader_for(read_config(folder), api.load_tokenizer(folder))
    length = options.calib_seq_len or options.seq_len
    windows: dict[str, Tensor] = {
        f"text {text.name}": read_windows(text, reader, options.seq_len, options.windows, spread=True).ids
        for text in read
    }
    for text in calibrations:
        parts = mixed_windows([text], reader, length, options.samples)
        windows[f"calibration {text.name}"] = torch.cat([part.ids for part in parts])
    path = place / f"windows-{digest_of(name)[:12]}.safetensors"
    save_file({key: ids.to(torch.int32) for key, ids in windows.items()}, path)
    digests = {key: hashlib.sha256(ids.numpy().tobytes()).hexdigest() for key, ids in windows.items()}
    return Model(name, folder, hash_model(folder)[0], path, digests)


def refusals(model: Model, recipes: dict[str, Recipe]) -> dict[str, MxrotError]:
    """Why recipes cannot quantize the model, by label."""
    source = FolderSource(model.folder, model.name)
    skeleton = build_apart(source.config)
    first = {
        label: next(find_problems(skeleton, source.family, one, model.name), None) for label, one in recipes.items()
    }
    return {label: problem for label, problem in first.items() if problem is not None}


@cache
def code_digest() -> str:
    """SHA-256 of everything in the package and of what measures: what was found with another may be something else."""
    root = Path(mxrot.__file__).parent
    found = hashlib.sha256(Path(__file__).with_name("everywhere_worker.py").read_bytes())
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".toml"):
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
