"""Scores in tasks: against log-likelihoods by hand and lm-eval's own model, kept answers, and bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import write_tiny_model
from tests.unit.evaluation.task_folder import ROWS, SIX, hits_by_hand, write_scorable_model, write_task_folder
from transformers import PreTrainedModel

from mxrot import api
from mxrot.errors import ConfigError, DataError, FamilyError, NumericsError
from mxrot.evaluation import Answers, TaskScore, count_examples, load_tasks, score_tasks, standard_error
from mxrot.evaluation import tasks as module
from mxrot.layers import PackedTokens
from mxrot.run_time_cache import RunTimeCache, set_cache


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scorable_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return api.open_model(folder, "cpu")[0]


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return api.load_tokenizer(folder)


@pytest.fixture(scope="module")
def tasks(data: Path) -> dict[str, Any]:
    return load_tasks(SIX, data)


# What is right


@pytest.mark.parametrize("recipe", [None, "hadamard"])
def test_every_hit_is_that_of_log_likelihoods_by_hand(
    folder: Path, tokenizer: Any, tasks: dict[str, Any], recipe: str | None
) -> None:
    model = api.open_model(folder, "cpu")[0] if recipe is None else api.quantize(folder, recipe, device="cpu")
    assert isinstance(model, PreTrainedModel)
    scores = score_tasks(model, tokenizer, tasks)
    assert list(scores) == list(SIX)
    for name, score in scores.items():
        assert score.hits == hits_by_hand(model, name), name
        assert score.n == ROWS and score.split == ("test" if name == "lambada_openai" else "validation")
    assert len({score.digest for score in scores.values()}) == len(SIX)
    assert 0 < sum(score.mean("acc") or 0 for score in scores.values()) < len(SIX)


# lm-eval hands the quantization_config of a folder to from_pretrained again, for any quantized model.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("recipe", [None, "hadamard"])
def test_scores_are_those_of_lm_evals_own_model(
    folder: Path, tokenizer: Any, tasks: dict[str, Any], tmp_path: Path, recipe: str | None
) -> None:
    """Which loads the folder itself, as `lm_eval --model hf --model_args pretrained=DIR` does, quantized or not."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    if recipe is not None:
        api.quantize(folder, recipe, tmp_path / "quantized", device="cpu")
        folder = tmp_path / "quantized"
    own = score_tasks(api.open_model(folder, "cpu")[0], tokenizer, tasks)
    options = {"dtype": "float32", "device": "cpu", "batch_size": 4}
    other = evaluate(lm=HFLM(pretrained=str(folder), **options), task_dict={"tasks": tasks}, bootstrap_iters=2)
    for name, score in own.items():
        found = other["results"][name]
        for metric in score.hits:
            assert score.mean(metric) == found[f"{metric},none"], name
            assert score.error(metric) == pytest.approx(found[f"{metric}_stderr,none"], rel=1e-12), name


def test_batches_change_nothing(model: PreTrainedModel, tokenizer: Any, tasks: dict[str, Any]) -> None:
    assert score_tasks(model, tokenizer, tasks, batch_size=1) == score_tasks(model, tokenizer, tasks, batch_size=13)


def test_examples_are_counted(tasks: dict[str, Any]) -> None:
    assert [count_examples(task) for task in tasks.values()] == [ROWS] * len(tasks)
    assert count_examples(next(iter(tasks.values())), 3) == 3


def test_limit_takes_the_first(model: PreTrainedModel, tokenizer: Any, tasks: dict[str, Any]) -> None:
    whole, part = (score_tasks(model, tokenizer, tasks, limit=limit)["piqa"] for limit in (None, 3))
    assert part.n == 3 and part.hits["acc"] == whole.hits["acc"][:3] and part.digest != whole.digest


def test_the_tokenizer_stays_as_it_was(model: PreTrainedModel, tokenizer: Any, tasks: dict[str, Any]) -> None:
    score_tasks(model, tokenizer, {"piqa": tasks["piqa"]}, limit=1)
    assert tokenizer.pad_token is None and len(tokenizer) == 256


def test_evaluate_tasks_opens_a_model_by_name(folder: Path, model: PreTrainedModel, tokenizer: Any, data: Path) -> None:
    by_name = api.evaluate_tasks(folder, "piqa", data=data, device="cpu")
    assert by_name == api.evaluate_tasks(model, ["piqa"], tokenizer=tokenizer, data=data)
    with pytest.raises(TypeError, match="tokenizer"):
        api.evaluate_tasks(model, "piqa", data=data)


def test_a_tokenizer_that_begins_with_nothing_is_refused(
    model: PreTrainedModel, tasks: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = api.load_tokenizer(write_tiny_model(tmp_path))
    with pytest.raises(FamilyError, match="neither a BOS nor an EOS token"):
        score_tasks(model, tokenizer, tasks)


def test_standard_error_of_a_share() -> None:
    """Of k hits in n it is sqrt(p (1 - p) / (n - 1)); that of one example is not known."""
    score = TaskScore({"acc": (1.0, 0.0, 1.0, 1.0, 0.0)}, "test", "")
    assert score.error("acc") == pytest.approx(math.sqrt(0.6 * 0.4 / 4), rel=1e-12)
    assert standard_error([1.0]) is None and score.mean("acc_norm") is None and score.best == "acc"
    assert score.as_table() == {
        "acc": 0.6,
        "acc_norm": None,
        "stderr": score.error("acc"),
        "acc_norm_stderr": None,
        "n": 5,
        "split": "test",
        "sha256": "",
    }


def test_logits_that_are_not_numbers_are_no_wrong_answers(
    model: PreTrainedModel, tokenizer: Any, tasks: dict[str, Any]
) -> None:
    model.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(NumericsError, match=r"piqa: .* NaN"):
        score_tasks(model, tokenizer, {"piqa": tasks["piqa"]})


# What is kept


class StopError(Exception):
    pass


def interrupted(at: int) -> Any:
    """A progress that stops the run once so many requests of a task are answered."""

    def told(done: int, total: int, what: str) -> None:
        if done >= at:
            raise StopError

    return told


@pytest.fixture
def rows_asked(model: PreTrainedModel) -> Iterator[list[int]]:
    """The numbers of rows of each forward pass."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    yield seen
    hook.remove()


def test_an_interrupted_run_goes_on_where_it_ended(
    folder: Path, model: PreTrainedModel, tokenizer: Any, tasks: dict[str, Any], tmp_path: Path, rows_asked: list[int]
) -> None:
    two = {name: tasks[name] for name in ("piqa", "openbookqa")}
    expected = score_tasks(model, tokenizer, two, batch_size=3)
    whole = sum(rows_asked)
    assert whole == (2 + 4) * ROWS
    path = tmp_path / "answers"
    with pytest.raises(StopError), api.kept_answers(path, model, folder) as answers:
        score_tasks(model, tokenizer, two, batch_size=3, answers=answers, progress=interrupted(2 * ROWS + 3))
    kept = len(path.read_text().splitlines()) - 1
    assert kept == 2 * ROWS + 2 * ROWS + 3  # all of piqa, and of openbookqa what was answered until then
    path.write_text(path.read_text()[:-20])  # a kill in the midst of a line: that answer is lost
    rows_asked.clear()
    with api.kept_answers(path, model, folder, resume=True) as answers:
        assert score_tasks(model, tokenizer, two, batch_size=3, answers=answers) == expected
    assert sum(rows_asked) == whole - (kept - 1)
    rows_asked.clear()
    with api.kept_answers(path, model, folder, resume=True) as answers:
        assert score_tasks(model, tokenizer, two, answers=answers) == expected
        answers.remove()
    assert not rows_asked and not path.exists()


def test_without_resume_a_run_starts_over(
    folder: Path, model: PreTrainedModel, tokenizer: Any, tasks: dict[str, Any], tmp_path: Path, rows_asked: list[int]
) -> None:
    for _ in range(2):
        with api.kept_answers(tmp_path / "answers", model, folder) as answers:
            score_tasks(model, tokenizer, {"piqa": tasks["piqa"]}, answers=answers)
    assert sum(rows_asked) == 2 * 2 * ROWS


def test_answers_of_another_model_are_refused(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "answers"
    with api.kept_answers(path, model, folder):
        pass
    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=f"{path}: answers of a run with another model; start over"):
        api.kept_answers(path, model, other, resume=True)
    with pytest.raises(ConfigError, match="another dtype; start over"):
        api.kept_answers(path, model.to(torch.bfloat16), folder, resume=True)


@pytest.mark.parametrize("content", ["", "nonsense\n", "[1, 2]\n", '{"owner": 3}\n'])
def test_a_file_without_answers_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "answers"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"{path}: holds no answers"):
        Answers(path, {"model": "x"}, resume=True)


# What is refused


def test_names_are_checked_before_data_are_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="knows no task 'arc_eazy'; did you mean arc_easy"):
        load_tasks(["piqa", "arc_eazy"], data)
    with pytest.raises(ConfigError, match="ai2_arc is several tasks"):
        load_tasks(["ai2_arc"], data)
    with pytest.raises(ConfigError, match="niah_single_1 names no data set"):
        load_tasks(["niah_single_1"], data)
    with pytest.raises(ConfigError, match="name at least one"):
        load_tasks([])
    with pytest.raises(DataError, match="no such folder"):
        load_tasks(["piqa"], data / "nowhere")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package lm-eval: pip install 'mxrot\[tasks\]'"):
        load_tasks(["piqa"], data)


def test_another_configuration_is_not_taken_for_the_one_that_is_meant(data: Path) -> None:
    with pytest.raises(DataError, match="expected the folder ARC-Challenge, got ARC-Easy"):
        load_tasks(["arc_challenge"], data)


def test_a_task_without_acc_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    with pytest.raises(ConfigError, match=r"gsm8k has no acc by log-likelihoods \(generate_until: exact_match"):
        load_tasks(["gsm8k"], tmp_path)


FILES = {
    "not JSON": ("lambada_test.jsonl", '{"text": "a b"}\n{"text"\n', "line 2 is not JSON"),
    "not an object": ("lambada_test.jsonl", "3\n", "line 1 is not an object"),
    "empty": ("lambada_test.jsonl", "\n", "holds no record"),
    "another split": ("lambada_train.jsonl", '{"text": "a b"}\n', "expected the split test, got train"),
    "another field": ("lambada_test.jsonl", '{"words": "a b"}\n', "lambada_openai of .*: lm-eval cannot load it"),
    "another data set": ("piqa_test.jsonl", '{"text": "a b"}\n', "neither lambada_openai/CONFIGURATION/SPLIT"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_data_are_one_clear_sentence(tmp_path: Path, case: str) -> None:
    name, content, expected = FILES[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=expected) as raised:
        load_tasks(["lambada_openai"], tmp_path)
    assert "\n" not in str(raised.value)


def test_a_damaged_data_set_is_named(data: Path, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path)
    (path,) = (folder / "piqa").rglob("*.arrow")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="piqa/plain_text/validation: datasets cannot load it"):
        load_tasks(["piqa"], folder)


def test_nothing_is_written_beside_the_data(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path)
    before = sorted(folder.rglob("*"))
    score_tasks(model, tokenizer, load_tasks(["hellaswag"], folder), limit=1)
    assert sorted(folder.rglob("*")) == before


def test_a_kill_while_answers_are_written_again_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, owner = tmp_path / "answers", {"model": "one"}
    with Answers(path, owner) as answers:
        answers.add(("a", "b"), (-1.0, True))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt), Answers(path, owner, resume=True):
            pass
    with Answers(path, owner, resume=True) as answers:
        assert answers.get(("a", "b")) == (-1.0, True)
        answers.add(("c", "d"), (-2.0, False))
    assert len(path.read_text().splitlines()) == 3


# Through a quantized cache


def test_requests_are_read_through_the_cache(
    folder: Path, tokenizer: Any, tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = api.open_model(folder, "cpu")[0]
    set_cache(model, RunTimeCache.of("int2_row_asym", "none"))
    some = {"piqa": tasks["piqa"]}
    packed: list[int] = []
    before = PackedTokens.append
    monkeypatch.setattr(PackedTokens, "append", lambda self, rows: packed.append(rows.shape[2]) or before(self, rows))
    coarse, answers = Answers(), Answers()
    score_tasks(model, tokenizer, some, answers=coarse)
    assert len(packed) >= 2 * 2 and min(packed) > 1  # keys and values of both blocks
    packed.clear()
    set_cache(model, RunTimeCache.of("none"))
    score_tasks(model, tokenizer, some, answers=answers)
    assert not packed
    apart = [abs(coarse._known[request][0] - found[0]) for request, found in answers._known.items()]
    assert len(apart) == 2 * ROWS and max(apart) > 0.01
