"""The bench over models, texts and calibrations: pairs of windows, the queue, and a whole run on tiny models."""

from __future__ import annotations

import importlib
import json
import math
import random
import signal
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_model import write_tiny_model

from mxrot import api
from mxrot.errors import ConfigError
from mxrot.evaluation import divergence
from mxrot.text import load_texts

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """Its modules."""
    sys.path.insert(0, str(FOLDER))
    names = (
        "paired",
        "task_queue",
        "everywhere",
        "everywhere_plan",
        "everywhere_rows",
        "everywhere_worker",
        "markdown",
    )
    try:
        yield Namespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))


# Pairs


def test_the_error_of_a_ratio_is_its_spread_over_draws(bench: Any) -> None:
    """Windows whose two measures have most of their spread in common; 2000 draws tell a spread to 1/sqrt(4000)."""
    draw = random.Random(0)
    found, errors, unpaired = [], [], []
    for _ in range(2000):
        hard = [draw.uniform(0.5, 1.5) for _ in range(40)]
        over = [0.8 * x + draw.gauss(0, 0.05) for x in hard]
        under = [x + draw.gauss(0, 0.05) for x in hard]
        ratio = bench.paired.ratio(over, under)
        found.append(ratio.value)
        errors.append(ratio.error)
        parts = [bench.paired.mean(values) for values in (over, under)]
        unpaired.append(ratio.value * math.hypot(*(part.error / part.value for part in parts)))
    spread = statistics.stdev(found)
    # Of first order in 0.05 / sqrt(40); four standard errors of the spread beside it.
    assert statistics.mean(errors) == pytest.approx(spread, rel=4 / math.sqrt(4000) + 0.02)
    assert statistics.mean(unpaired) > 3 * spread


def test_a_ratio_to_itself_has_no_error_and_one_to_nothing_no_value(bench: Any) -> None:
    values = [0.1, 0.4, 0.2]
    assert bench.paired.ratio(values, values) == (1.0, 0.0)
    assert bench.paired.ratio(values[:1], values[:1]).error is None
    assert math.isnan(bench.paired.ratio(values, [0.0] * 3).value)
    with pytest.raises(ValueError, match="3 and 2 windows"):
        bench.paired.ratio(values, values[:2])


def test_what_moves_the_logarithm_of_a_ratio_has_its_error(bench: Any) -> None:
    over, under = [0.1, 0.4, 0.2, 0.3], [0.2, 0.5, 0.1, 0.3]
    moves, ratio = bench.paired.apart(over, under), bench.paired.ratio(over, under)
    assert sum(moves) == pytest.approx(0.0, abs=1e-15)
    assert bench.paired.mean(moves).error == pytest.approx(ratio.error / ratio.value, rel=1e-12)


def test_the_same_windows_twice_are_no_news_and_other_texts_are(bench: Any) -> None:
    one, other = [0.1, -0.1, 0.2, -0.2], [0.3, -0.1, -0.1, -0.1]
    error = bench.paired.error_of_geometric_mean
    alone = error(2.0, [[one]])
    assert alone == pytest.approx(2.0 * statistics.stdev(one) / 2)
    assert error(2.0, [[one, one]]) == pytest.approx(alone)
    assert error(2.0, [[one], [one]]) == pytest.approx(alone / math.sqrt(2))
    alike = [[one, other]]  # their sum, window by window
    assert error(1.0, alike) == pytest.approx(statistics.stdev([a + b for a, b in zip(one, other, strict=True)]) / 4)
    assert error(1.0, [[one], [[0.0]]]) is None
    assert bench.paired.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


def test_perplexity_over_the_original_is_of_paired_windows(bench: Any) -> None:
    found = bench.paired.exp_of_mean_difference([3.0, 3.4], [2.0, 2.2])
    assert found.value == pytest.approx(math.exp(3.2) / math.exp(2.1))
    assert found.error == pytest.approx(found.value * 0.1)  # 1.0 and 1.2


# The queue

WORKER = """
import json, os, sys, time
for line in sys.stdin:
    what = json.loads(line)
    if what.get("dies"):
        os._exit(9)
    time.sleep(what.get("sleeps", 0))
    answer = {"error": "no"} if what.get("fails") else {"pid": os.getpid()}
    print(json.dumps(answer | ({"ends": True} if what.get("ends") else {})), flush=True)
"""


@pytest.fixture
def queue(bench: Any) -> Callable[..., Any]:
    """Runs tasks and gives their answers, in the order in which they came, and what was not begun."""

    def run(tasks: list[Any], slots: int = 2, stop_after: float = 60.0) -> Any:
        answers: dict[str, Any] = {}
        module = bench.task_queue
        made = module.TaskQueue(tasks, lambda task, answer, seconds: answers.update({task.name: answer}), stop_after)
        left = made.run([module.Slot((sys.executable, "-S", "-c", WORKER))] * slots)
        return Namespace(answers=answers, left=[task.name for task in left])

    return run


def test_what_needs_others_comes_after_them_and_one_process_does_many(bench: Any, queue: Any) -> None:
    task = bench.task_queue.Task
    tasks = [task("last", {}, ("a", "b", "not there")), task("a", {"sleeps": 0.05}), task("b", {}), task("c", {})]
    found = queue(tasks)
    assert list(found.answers) != ["last"] and set(found.answers) == {"a", "b", "c", "last"} and not found.left
    assert list(found.answers).index("last") > max(list(found.answers).index(name) for name in "ab")
    alone = queue(tasks, slots=1)
    assert len({answer["pid"] for answer in alone.answers.values()}) == 1


def test_what_fails_takes_only_what_needs_it_along(bench: Any, queue: Any) -> None:
    task = bench.task_queue.Task
    tasks = [
        task("a", {"dies": True}),
        task("b", {}, ("a",)),
        task("c", {}, ("b",)),
        task("d", {}),
        task("e", {"fails": True}),
    ]
    found = queue([*tasks, task("f", {})], slots=1).answers
    assert found["a"]["error"] == "the process ended with code 9"
    assert "needs a, which failed: the process ended with code 9" in found["b"]["error"] and "error" in found["c"]
    assert found["e"] == {"error": "no"} and found["d"]["pid"] == found["f"]["pid"]


def test_a_process_that_asks_for_it_is_replaced(bench: Any, queue: Any) -> None:
    task = bench.task_queue.Task
    found = queue([task("a", {"ends": True}), task("b", {})], slots=1).answers
    assert found["a"]["pid"] != found["b"]["pid"]


def test_nothing_is_begun_after_the_time(bench: Any, queue: Any) -> None:
    task = bench.task_queue.Task
    found = queue([task("a", {"sleeps": 0.3}), task("b", {})], slots=1, stop_after=0.1)
    assert list(found.answers) == ["a"] and found.left == ["b"]


def test_an_error_of_the_bench_itself_ends_it(bench: Any) -> None:
    def answered(task: Any, answer: Any, seconds: float) -> None:
        raise OSError("no space left")

    module = bench.task_queue
    tasks = [module.Task("a", {}), module.Task("b", {"sleeps": 30.0})]
    started = time.monotonic()
    with pytest.raises(OSError, match="no space left"):
        module.TaskQueue(tasks, answered, 60.0).run([module.Slot((sys.executable, "-S", "-c", WORKER))])
    assert time.monotonic() - started < 20


# What is finished


def test_a_line_that_was_cut_off_is_nothing_and_spoils_nothing(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "finished.jsonl"
    bench.everywhere.Finished(path, "code").keep("one", {"value": 1})
    with path.open("a") as file:
        file.write('{"key": "two", "code": "code", "entr')
    again = bench.everywhere.Finished(path, "code")
    assert again.find("one") == {"value": 1} and again.find("two") is None
    again.keep("three", {"value": 3})
    last = bench.everywhere.Finished(path, "code")
    assert (last.find("one"), last.find("three")) == ({"value": 1}, {"value": 3})
    assert bench.everywhere.Finished(path, "other").find("one") is None
    assert bench.everywhere.Finished(path, None).find("one") == {"value": 1}


# All of it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, of which the last has no whole blocks, and three texts."""
    folder = tmp_path_factory.mktemp("everywhere")
    for number, name in enumerate(("first", "second")):
        write_tiny_model(folder / name, seed=number)
    write_tiny_model(folder / "odd", intermediate_size=80)
    for name in ("words", "code", "train"):
        draw = random.Random(name)
        (folder / f"{name}.txt").write_text(" ".join(draw.choice(("alpha", "beta", "x1", "no")) for _ in range(200)))
    return folder


class InThisProcess:
    """A queue that does everything here and at once; `done` is what it did."""

    done: list[str] = []  # noqa: RUF012
    answer: Callable[[dict[str, Any]], dict[str, Any]]

    def __init__(self, tasks: list[Any], answered: Callable[..., None], stop_after: float) -> None:
        self.tasks, self.answered = tasks, answered

    def run(self, slots: list[Any]) -> list[Any]:
        for task in self.tasks:
            InThisProcess.done.append(task.name)
            self.answered(task, type(self).answer(task.what), 0.1)
        return []


@pytest.fixture
def run(bench: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The command with these words; what it writes."""
    monkeypatch.setattr(bench.everywhere, "TaskQueue", InThisProcess)
    monkeypatch.setattr(InThisProcess, "answer", staticmethod(bench.everywhere_worker.answer), raising=False)
    monkeypatch.setattr(InThisProcess, "done", [])
    shared = f"--seq-len 24 --windows 3 --samples 2 --device cpu --work {tmp_path / 'work'} --out {tmp_path / 'out'}"

    def called(words: str, code: int = 0) -> dict[str, Any]:
        InThisProcess.done.clear()
        monkeypatch.setattr(sys, "argv", ["everywhere.py", *words.format(place=place).split(), *shared.split()])
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            bench.everywhere.main()
        # A handler that stays would reach processes that later tests fork, which may then survive SIGTERM.
        assert ended.value.code == code and signal.getsignal(signal.SIGTERM) == handler
        (file,) = (tmp_path / "out").glob("*.json")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    return called


TEXTS = "--texts words={place}/words.txt code={place}/code.txt"


def test_figures_are_those_of_both_models_on_the_same_windows(bench: Any, run: Any, place: Path) -> None:
    found = run(
        f"--models {{place}}/first {TEXTS} --calibrations train={{place}}/train.txt --recipes rtn --base hadamard"
    )
    rows = {row["recipe"]: row["texts"] for row in found["rows"]}
    assert list(rows) == ["hadamard", "rtn"] and list(rows["rtn"]) == ["words", "code"]
    original, model = api.open_model(place / "first", "cpu")[0], api.quantize(str(place / "first"), "rtn", device="cpu")
    ids = api.read_texts(place / "first", f"words={place}/words.txt", seq_len=24)[0].ids
    places = [0, len(ids) // 3, 2 * len(ids) // 3]
    exact, one = divergence(model, original, ids[places], 3), rows["rtn"]["words"]
    assert one["kl"] == pytest.approx(exact.kl, rel=1e-4) and exact.kl > 1e-5
    assert one["kl_error"] == pytest.approx(exact.kl_error, rel=1e-3)
    assert one["perplexity"] == pytest.approx(exact.ppl, rel=1e-6)
    assert one["perplexity_ratio"] == pytest.approx(exact.ppl / exact.original_ppl, rel=1e-6)
    assert one["agreement"] == pytest.approx(exact.agreement) and one["windows"] == 3
    assert one["kl_ratio"] == pytest.approx(one["kl"] / rows["hadamard"]["words"]["kl"])
    (whole,) = found["summaries"]
    ratios = [rows["rtn"][text]["kl_ratio"] for text in rows["rtn"]]
    assert whole["geometric_mean"] == pytest.approx(math.prod(ratios) ** 0.5) and whole["cases"] == 2
    assert whole["largest"]["kl_ratio"] == max(ratios)
    assert "everywhere.py" in found["command"] and found["kind"] == "everywhere" and len(found["code"]) == 64


@pytest.mark.slow
def test_processes_of_their_own_give_the_same(
    bench: Any, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two of them; what they find is what this one does."""
    words = f"--models {{place}}/first {TEXTS} --calibrations own --base rtn --recipes smoothquant --processes 2"
    here = run(words)
    monkeypatch.setattr(bench.everywhere, "TaskQueue", bench.task_queue.TaskQueue)
    (tmp_path / "work" / "finished.jsonl").unlink()
    there = run(words)
    assert [row["texts"] for row in there["rows"]] == [row["texts"] for row in here["rows"]]


def test_what_is_finished_is_not_done_again_and_more_may_be_asked_for(run: Any, bench: Any) -> None:
    words = f"--models {{place}}/first {TEXTS} --calibrations train={{place}}/train.txt --base rtn"
    first = run(f"{words} --recipes hadamard")
    assert InThisProcess.done == ["first, original", "first, no text, rtn, seed 0", "first, no text, hadamard, seed 0"]
    again = run(f"{words} --recipes hadamard")
    assert not InThisProcess.done and again["rows"] == first["rows"]
    more = run(f"{words} --recipes hadamard --variant smooth hadamard smoothing.alpha=0.5 --seeds 0 1")
    assert [name for name in InThisProcess.done if "seed 0" in name] == ["first, train, smooth, seed 0"]
    assert [row["recipe"] for row in more["rows"]] == ["rtn", "hadamard", "smooth"]
    assert more["rows"][2]["seeds"] == [0, 1] and len(more["rows"][2]["texts"]["words"]["kl_ratio_of_seed"]) == 2


def test_what_the_model_writes_is_a_calibration(bench: Any, run: Any, tmp_path: Path) -> None:
    words = f"--models one={{place}}/first two={{place}}/second {TEXTS} --calibrations own train={{place}}/train.txt"
    found = run(f"{words} --recipes rtn --variant smooth hadamard smoothing.alpha=0.5 --base rtn")
    assert [name for name in InThisProcess.done if "own text" in name] == [
        "one, its own text, seed 0",
        "two, its own text, seed 0",
    ]
    written = [bench.everywhere_worker.load_file(path)["ids"] for path in (tmp_path / "work").glob("own-*.safetensors")]
    assert [tuple(ids.shape) for ids in written] == [(2, 24)] * 2 and not written[0].equal(written[1])
    rows = {(row["model"], row["calibration"], row["recipe"]): row["texts"]["words"]["kl"] for row in found["rows"]}
    assert len(rows) == 8
    assert rows["one", "own", "rtn"] == rows["one", "train", "rtn"]  # reads no text
    assert rows["one", "own", "smooth"] != rows["one", "train", "smooth"]
    assert [one["calibration"] for one in found["summaries"]] == ["own", "train", "own and train"]
    table = bench.markdown.table([found])
    lines = table.splitlines()
    assert (
        lines[0] == "| model | calibrated on | recipe | words: KL (x) | PPL (x) | code: KL (x) | PPL (x) "
        "| same top token | seconds |"
    )
    assert lines[2].startswith(f"| one | own | rtn | {rows['one', 'own', 'rtn']:.4f} (1) | ")
    assert len({line.count("|") for line in lines[:10]}) == 1 and not lines[10]
    assert lines[11] == "| calibrated on | recipe | one | two | all | largest | below 1 |"
    half = {**found, "rows": found["rows"][:4]}, {**found, "rows": found["rows"][4:]}
    assert bench.markdown.table(list(half)) == table


def test_a_recipe_that_fails_stops_nothing_else(
    run: Any, bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = bench.everywhere_worker.measure

    def fails(what: dict[str, Any]) -> Any:
        if what["label"] == "hadamard":
            raise RuntimeError("an accident")
        return measure(what)

    monkeypatch.setattr(bench.everywhere_worker, "measure", fails)
    words = f"--models {{place}}/odd {{place}}/first {TEXTS} --calibrations own --recipes hadamard rtn --base rtn"
    found = run(words, code=1)
    rows = {(row["model"], row["recipe"]): row for row in found["rows"]}
    assert rows["first", "hadamard"]["error"] == "RuntimeError: an accident" and "texts" in rows["first", "rtn"]
    assert all("80 is not a multiple of" in rows["odd", recipe]["error"] for recipe in ("hadamard", "rtn"))
    shown = capsys.readouterr().out
    assert "FAILED first, no text, hadamard, seed 0: RuntimeError: an accident" in shown
    assert "| first | own | hadamard | RuntimeError: an accident |" in bench.markdown.table([found])
    monkeypatch.setattr(bench.everywhere_worker, "measure", measure)
    again = run(words.replace("{place}/odd ", ""))
    assert InThisProcess.done == ["first, original", "first, no text, hadamard, seed 0"]
    assert all("texts" in row for row in again["rows"])


def test_a_text_is_not_measured_on_and_calibrated_on(bench: Any, place: Path) -> None:
    read, calibrations = (
        load_texts([f"a={place}/words.txt"], "evaluation"),
        load_texts([f"b={place}/words.txt"], "calibration"),
    )
    with pytest.raises(ConfigError, match="text a is calibration b"):
        bench.everywhere_plan.check_apart(read, calibrations)


def test_other_windows_do_not_stand_in_one_table(bench: Any) -> None:
    one: dict[str, Any] = {"kind": "everywhere", "base": "rtn", "rows": []}
    one["models"] = {"demo": {"files": {}, "windows": {"text a": "1", "calibration b": "1"}}}
    other = one | {"models": {"demo": {"files": {}, "windows": {"text a": "2"}}}}
    with pytest.raises(SystemExit, match="demo is another model in two of the files, or was measured on other windows"):
        bench.markdown.table([one, other])
    with pytest.raises(SystemExit, match="ratios to rtn and to mxrot"):
        bench.markdown.table([one, one | {"base": "mxrot"}])
    again = one | {"models": {"demo": {"files": {}, "windows": {"text a": "1", "calibration c": "1"}}}}
    assert bench.markdown.table([one, again]) == bench.markdown.table([one])
