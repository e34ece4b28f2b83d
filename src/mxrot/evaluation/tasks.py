"""Multiple-choice and last-word tasks of lm-evaluation-harness: their prompts, their data and their metrics.

`acc` is the share of examples in which the right choice has the largest log-likelihood. For `acc_norm`, each
log-likelihood is divided by the number of characters of the choice. For last words (LAMBADA), `acc` is the share that
greedy decoding gets right. Each task has as many examples in the prompt as its own definition says, mostly none.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mxrot.calibration import ONE, World
from mxrot.errors import ConfigError, DataError, FamilyError
from mxrot.evaluation.answers import Answers
from mxrot.evaluation.task_data import local_splits
from mxrot.progress import Progress, silent

REQUESTS_AT_ONCE = {"cpu": 8, "cuda": 64}
_SCORABLE = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class TaskScore:
    """The score of a model in one task."""

    hits: dict[str, tuple[float, ...]]
    """By metric (`acc`, `acc_norm`), 1 or 0 for each example."""
    split: str
    digest: str
    """SHA-256 of all prompts, choices and right answers."""

    @property
    def n(self) -> int:
        """The number of examples."""
        return len(self.hits["acc"])

    @property
    def best(self) -> str:
        """The metric that is reported first: acc_norm if the task has it, otherwise acc."""
        return "acc_norm" if "acc_norm" in self.hits else "acc"

    def mean(self, metric: str) -> float | None:
        """The mean of a metric. None if the task does not have it."""
        return sum(self.hits[metric]) / self.n if metric in self.hits else None

    def error(self, metric: str) -> float | None:
        """The standard error of that mean. None if there is no such metric, or only one example."""
        return standard_error(self.hits[metric]) if metric in self.hits else None

    def as_table(self) -> dict[str, Any]:
        """The score as `--json` writes it. `stderr` is the standard error of `acc`."""
        return {
            "acc": self.mean("acc"),
            "acc_norm": self.mean("acc_norm"),
            "stderr": self.error("acc"),
            "acc_norm_stderr": self.error("acc_norm"),
            "n": self.n,
            "split": self.split,
            "sha256": self.digest,
        }


def mean_score(scores: Sequence[TaskScore]) -> TaskScore:
    """The mean of several scores for the same questions, such as those of several seeds. Each hit is a mean."""
    first = scores[0]
    hits = {
        metric: tuple(sum(hits) / len(hits) for hits in zip(*(one.hits[metric] for one in scores), strict=True))
        for metric in first.hits
    }
    return TaskScore(hits, first.split, first.digest)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent values. None for a single value."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def load_tasks(
    names: Sequence[str], data: Path | None = None, announce: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The lm-eval tasks of these names, with their data: from the hub, or from the folder `data` (`task_data`).

    If the data come from the hub, a name can stand for several tasks (`ai2_arc`). `announce` is called before they are
    fetched. ConfigError for a name that lm-eval does not know, for a task without `acc`, and if lm-eval is missing.
    DataError if the data are not found.
    """
    if not names:
        raise ConfigError("--tasks: name at least one, as in arc_easy,piqa")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs the package lm-eval: pip install 'mxrot[tasks]'")
    if data is not None and not data.is_dir():
        raise DataError(f"--task-data {data}: no such folder")
    manager = _manager()
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            meant = f"; did you mean {' or '.join(near)}?" if near else "; `lm_eval ls tasks` lists them"
            raise ConfigError(f"--tasks: lm-eval knows no task {name!r}{meant}")
        if data is not None and name not in manager.all_subtasks:
            raise ConfigError(f"--tasks: {name} is several tasks; name each, where their data are in a folder")
    if data is None:
        announce(f"Getting the data of {', '.join(names)} from the hub, unless they are here already")
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        with _without_bars(), _without_warnings():
            spec = name if data is None else {"group": "local", "task": [_local(manager.task_index[name].cfg, data)]}
            tasks |= _build(manager, spec, f"{name} of {data or 'the hub'}")
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in _SCORABLE or "acc" not in task.aggregation():
            kinds = ", ".join(task.aggregation())
            raise ConfigError(f"--tasks: {name} has no acc by log-likelihoods ({task.OUTPUT_TYPE}: {kinds})")
    return tasks


@cache
def _manager() -> Any:
    """lm-eval's index of tasks. It takes some seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _local(config: dict[str, Any], data: Path) -> dict[str, Any]:
    """The changes to a task so that it reads its data from a folder."""
    if not config.get("dataset_path"):
        raise ConfigError(f"--task-data: {config['task']} names no data set that a folder could hold")
    splits = local_splits(data, config["dataset_path"], config.get("dataset_name"))
    kinds = ("training_split", "validation_split", "test_split")
    kept = {kind: config.get(kind) if config.get(kind) in splits else None for kind in kinds}
    if kept["test_split"] is None and kept["validation_split"] is None:
        wanted = " or ".join(config[kind] for kind in kinds[1:] if config.get(kind))
        raise DataError(f"{data}: for {config['task']} expected the split {wanted}, got {', '.join(splits)}")
    return {"task": config["task"], "custom_dataset": lambda **_: splits, **kept}


def _build(manager: Any, spec: Any, what: str) -> dict[str, Any]:
    try:
        return dict(manager.load([spec])["tasks"])
    except Exception as error:  # any error of the data reader or of the task's own code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DataError(f"{what}: lm-eval cannot load it (--task-data takes a folder): {reason}") from error


def count_examples(task: Any, limit: int | None = None) -> int:
    """The number of examples of a task of `load_tasks`, at most `limit`."""
    count = len(task.eval_docs)
    return count if limit is None else min(count, limit)


def score_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: dict[str, Any],
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    answers: Answers | None = None,
    progress: Progress = silent,
    world: World = ONE,
) -> dict[str, TaskScore]:
    """The scores of a model on tasks of `load_tasks`, by their names.

    `limit` takes the first examples of each. Requests that `answers` knows are not asked again. The processes of a
    `world` share the others, and need the same known answers (`Answers.shared_by`). Their batches differ from those of
    one process, so log-likelihoods can differ by rounding. NumericsError if a log-likelihood is not finite, FamilyError
    for a tokenizer with neither BOS nor EOS.
    """
    from lm_eval.evaluator import evaluate

    from mxrot.evaluation.harness import Harness

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise FamilyError("the tokenizer has neither a BOS nor an EOS token, of which lm-eval needs one")
    batch_size = batch_size or REQUESTS_AT_ONCE.get(model.device.type, 8)
    with _without_warnings():
        harness = Harness(model, tokenizer, Answers() if answers is None else answers, batch_size, progress, world)
    scores = {}
    for name, task in tasks.items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
        with _without_bars():
            found = evaluate(lm=harness, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
        scores[name] = _score(task, found["samples"][name])
    return scores


def _score(task: Any, samples: list[dict[str, Any]]) -> TaskScore:
    metrics = [metric for metric in ("acc", "acc_norm") if metric in samples[0]]
    asked = [[sample["arguments"], sample["target"]] for sample in samples]
    return TaskScore(
        hits={metric: tuple(float(sample[metric]) for sample in samples) for metric in metrics},
        split=str(task.config.test_split or task.config.validation_split),
        digest=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """While open, lm-eval's warnings about models and data that are passed in are silenced."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    """While open, progress bars of lm-eval and datasets are hidden. lm-eval has no option for this."""
    import datasets
    from lm_eval.api import task

    were_shown = not datasets.are_progress_bars_disabled()
    bars = task.tqdm
    task.tqdm = lambda iterable, **_: iterable
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        task.tqdm = bars
        if were_shown:
            datasets.enable_progress_bars()
