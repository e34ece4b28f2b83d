"""How long the parts of a comparison are taken to be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from mxrot.evaluation import count_examples
from mxrot.progress.steps import TOTAL, Steps
from mxrot.report.costs import measuring_costs
from mxrot.text import Windows


def windows(count: int) -> Windows:
    return cast(Windows, SimpleNamespace(ids=torch.zeros(count, 8, dtype=torch.int64)))


def test_each_text_and_each_task_is_a_phase() -> None:
    """The requests of the last of three tasks move what is told, which stood still when all had one share."""
    costs = measuring_costs([windows(2), windows(4)], [10, 30, 20])
    assert len(costs) == 5 and costs[1] == 2 * costs[0] and costs[3] == 3 * costs[2]
    told: list[float] = []
    progress = Steps(lambda done, *_: told.append(done), [costs]).of(0, "FP16")
    for total in (16, 32, 20, 120, 40):
        for done in (0, total // 2, total):
            progress(done, total, "requests")
    assert told == sorted(told) and len(set(told)) == 11 and told[-1] == TOTAL


def test_without_tasks_there_are_texts_alone() -> None:
    assert len(measuring_costs([windows(2)], [])) == 1


def test_examples_are_counted_up_to_the_limit() -> None:
    task: Any = SimpleNamespace(eval_docs=range(7))
    assert [count_examples(task, limit) for limit in (None, 3, 9)] == [7, 3, 7]
