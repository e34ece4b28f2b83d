"""Checkpoints that a comparison reads instead of quantizing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxrot.checkpoint import has_run, is_checkpoint, read_run
from mxrot.documents import read_text
from mxrot.errors import CheckpointError, ConfigError
from mxrot.models import find_model, read_config
from mxrot.recipe import Recipe


@dataclass(frozen=True)
class GivenCheckpoint:
    """A folder that mxrot has written."""

    label: str
    """The name of its row."""
    folder: Path
    recipe: Recipe
    made: dict[str, Any]
    """The fields of a `Run` from its run.json. Empty if there is none."""


def given_checkpoints(names: Sequence[str], vocabulary: int, taken: Collection[str]) -> list[GivenCheckpoint]:
    """The checkpoints of these folders or ids. The label of each is the shortest end of its path that differs from the
    others and from the names in `taken`.

    CheckpointError if one was not written by mxrot. ConfigError if one is named twice, or if its vocabulary has not the
    size of the original's, `vocabulary`.
    """
    folders = [_folder(name, vocabulary) for name in names]
    for name, folder in zip(names, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"--checkpoints: names {name} twice")
    labels = labels_of(folders, taken)
    return [_given(label, folder) for label, folder in zip(labels, folders, strict=True)]


def labels_of(folders: Sequence[Path], taken: Collection[str]) -> list[str]:
    """The last part of each path, with as many parts before it as needed to differ from all others and from `taken`."""
    length, wanted = dict.fromkeys(folders, 1), [folder.name for folder in folders]
    while clashes := {each for each, times in Counter([*wanted, *taken]).items() if times > 1}:
        for folder, label in zip(folders, wanted, strict=True):
            length[folder] += label in clashes
        longer = ["/".join(folder.parts[-length[folder] :]) for folder in folders]
        if longer == wanted:
            return [str(folder) for folder in folders]
        wanted = longer
    return wanted


def errors_by_block(blocks: Iterable[Sequence[dict[str, Any]]]) -> dict[str, list[float]]:
    """The fields `weight_errors` and `output_errors` of a `Run`, from the linears of each block of run.json."""
    found: dict[str, list[float]] = {"weight_errors": [], "output_errors": []}
    for linears in blocks:
        for key in ("weight_error", "output_error"):
            values = [linear[key] for linear in linears if linear[key] is not None]
            if values:
                found[f"{key}s"].append(sum(values) / len(values))
    return found


def _folder(name: str, vocabulary: int) -> Path:
    folder = find_model(name).resolve()
    if not is_checkpoint(folder):
        raise CheckpointError(f"--checkpoints {name}: not a checkpoint written by mxrot")
    own = int(read_config(folder).get_text_config().vocab_size)
    if own != vocabulary:
        raise ConfigError(
            f"--checkpoints {name}: has {own} tokens in its vocabulary, and the original {vocabulary}; name a "
            "checkpoint of this model"
        )
    return folder


def _given(label: str, folder: Path) -> GivenCheckpoint:
    recipe = Recipe.from_toml(read_text(folder / "recipe.toml"), str(folder / "recipe.toml"))
    if not has_run(folder):
        return GivenCheckpoint(label, folder, recipe, {})
    run = read_run(folder)
    made = {"seed": run["seed"], "seconds": run["seconds"], "peak_bytes": run.get("peak_gpu_bytes")}
    return GivenCheckpoint(label, folder, recipe, made | errors_by_block(block["linears"] for block in run["blocks"]))
