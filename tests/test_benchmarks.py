"""The tables of benchmarks/ are recipes that exist, and their rows add up."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config, write_tiny_model
from tests.unit.evaluation.task_folder import write_scorable_model, write_task_folder
from transformers import LlamaForCausalLM

import mxrot
from mxrot.evaluation import TaskScore
from mxrot.models import FolderSource

FOLDER = Path(__file__).parent.parent / "benchmarks"


def imported(name: str) -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def accuracy() -> Any:
    return imported("accuracy")


@pytest.fixture(scope="module")
def tasks() -> Any:
    return imported("tasks")


def test_tables_in_the_documentation_are_those_of_the_results(tasks: Any) -> None:
    markdown = imported("markdown")
    found = 0
    for page in (FOLDER.parent / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for names, table in re.findall(r"<!-- table: (.*?) -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL):
            results = [json.loads((FOLDER / "results" / name).read_text(encoding="utf-8")) for name in names.split()]
            if "_tasks_" in names:
                rows = {row["label"]: row for row in results[0]["rows"]}
                assert tasks.table(list(tasks.ROWS), rows) == table, page.name
            else:
                assert markdown.table(results) == table, page.name
            found += 1
    assert found


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    short = imported("short_table")
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    ((names, table),) = re.findall(r"<!-- short table: (.*?) -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL)
    results = [json.loads((FOLDER / "results" / name).read_text(encoding="utf-8")) for name in names.split()]
    assert short.table(results) == table
    with pytest.raises(SystemExit, match="no result for quarot"):
        short.table(results[1:])


def test_every_row_is_a_recipe_and_has_a_name_of_its_own(accuracy: Any) -> None:
    from mxrot.recipe import load_recipe

    for table, runs in accuracy.TABLES.items():
        assert len({run.label for run in runs}) == len(runs), table
        for run in runs:
            assert run.seeds and (run.recipe is None or load_recipe(run.recipe).changed(run.changes))


def entry(label: str, seed: int, *values: float) -> dict[str, Any]:
    texts = dict(zip(("one", "two"), values, strict=True))
    return {
        "label": label,
        "seed": seed,
        "quantize_seconds": 1.0,
        "peak_gpu_bytes": 2e9,
        "perplexity": {name: {"ppl": value} for name, value in texts.items()},
    }


def options(**changes: Any) -> Namespace:
    asked = {"table": "tuned", "only": "", "model": "demo", "out": None, "device": "cpu"}
    whole = {"claims": None, "known": [], "seeds": None, "stop_after": math.inf}
    return Namespace(**(asked | whole | changes))


def test_rows_are_means_over_seeds_relative_to_the_unquantized_model(accuracy: Any) -> None:
    label = "mxrot-tuned"
    entries = [entry(label, 2, 26.0, 12.0), entry("FP16", 0, 20.0, 10.0), entry(label, 0, 22.0, 12.5)]
    original, tuned = accuracy.summaries(options(), entries)
    assert original["relative"] == {"one": 1.0, "two": 1.0}
    assert tuned["means"] == {"one": 24.0, "two": 12.25} and tuned["spread"] == 4.0
    assert tuned["relative"] == {"one": 1.2, "two": 1.225}
    assert [found["seed"] for found in tuned["seeds"]] == [0, 2]
    assert not tuned["holds"]  # 24.0 is, 1.225 is not
    assert "MISSED" in accuracy.line(tuned) and "24.000" in accuracy.line(tuned)
    entries[0]["perplexity"]["two"]["ppl"] = 11.0
    assert accuracy.summaries(options(), entries)[1]["holds"]


def test_an_error_is_a_result(accuracy: Any) -> None:
    failed = {"label": "mxrot-tuned", "seed": 0, "error": "NumericsError: layer 3"}
    row = accuracy.summaries(options(), [failed])[0]
    assert "FAILED: NumericsError: layer 3" in accuracy.line(row)


@pytest.fixture
def quick(accuracy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark with measurements that take no time; `taken` is what was measured."""
    taken: list[tuple[str, int]] = []

    class Bench:
        @staticmethod
        def prepare(options: Namespace, device: str) -> Bench:
            return Bench()

        def description(self) -> dict[str, Any]:
            return {"device": "cpu"} | dict.fromkeys(accuracy.SAME, "same")

    def measure(run: Any, seed: int, bench: Bench) -> dict[str, Any]:
        taken.append((run.label, seed))
        value = float(len(run.label) + seed)
        return {"perplexity": {"one": {"ppl": value}, "two": {"ppl": value}}}

    monkeypatch.setattr(accuracy, "Bench", Bench)
    monkeypatch.setattr(accuracy, "measure", measure)
    return Namespace(taken=taken, **{name: getattr(accuracy, name) for name in ("measure_units", "known_entries")})


def units(accuracy: Any) -> list[tuple[str, int]]:
    return sorted((run.label, seed) for run in accuracy.TABLES["base"] for seed in run.seeds)


def test_processes_that_share_claims_measure_everything_once(accuracy: Any, quick: Any, tmp_path: Path) -> None:
    """Two that stop at different seeds and one that takes the rest; together the rows are those of one process."""
    out = tmp_path / "parts"
    for seeds in ([2], [0], None):
        quick.measure_units(options(table="base", out=out / str(seeds), claims=tmp_path / "claims", seeds=seeds))
    assert sorted(quick.taken) == units(accuracy)
    found = quick.known_entries(sorted(out.glob("*/*.json")), dict.fromkeys(accuracy.SAME, "same"))
    rows = accuracy.summaries(options(table="base"), found)
    assert [row["label"] for row in rows] == [run.label for run in accuracy.TABLES["base"]]
    assert [len(row["seeds"]) for row in rows] == [len(run.seeds) for run in accuracy.TABLES["base"]]


def test_what_is_known_is_not_measured_again(accuracy: Any, quick: Any, tmp_path: Path) -> None:
    quick.measure_units(options(table="base", out=tmp_path / "first", only="rtn|duquant"))
    first = list(quick.taken)
    (known,) = (tmp_path / "first").glob("*.json")
    quick.measure_units(options(table="base", out=tmp_path / "all", known=[known]))
    assert 0 < len(first) < len(quick.taken) and sorted(quick.taken) == units(accuracy)
    (written,) = (tmp_path / "all").glob("*.json")
    assert [row["label"] for row in json.loads(written.read_text())["rows"]] == [
        run.label for run in accuracy.TABLES["base"]
    ]


def test_results_of_another_commit_are_not_known(accuracy: Any, quick: Any, tmp_path: Path) -> None:
    quick.measure_units(options(table="base", out=tmp_path, only="rtn"))
    (known,) = tmp_path.glob("*.json")
    with pytest.raises(SystemExit, match="does not belong into this table: commit differ"):
        quick.known_entries([known], dict.fromkeys(accuracy.SAME, "same") | {"commit": "other"})


def test_nothing_is_begun_after_the_time(quick: Any, tmp_path: Path) -> None:
    quick.measure_units(options(table="base", out=tmp_path, stop_after=-1.0))
    assert not quick.taken


def test_only_takes_several_parts_of_labels(accuracy: Any) -> None:
    labels = [run.label for run in accuracy.chosen_runs(options(table="base", only="rtn|released"))]
    assert labels == ["rtn, even", "rtn, floor", "duquant++-released", "duquant++-released-gptq"]


def test_a_checkpoint_that_reloads_as_another_model_is_seen(accuracy: Any) -> None:
    for found, reloads in ((24.00001, True), (24.001, False)):
        again = entry("mxrot-tuned", 0, 24.0, 12.0) | {"reloaded": {"one": found, "two": 12.0}}
        (row,) = accuracy.summaries(options(), [again])
        assert row["reloads"] is reloads
        assert ("reloads as it was" in accuracy.line(row)) is reloads


# Tasks


def score(acc: str, acc_norm: str | None = None) -> TaskScore:
    """From strings of hits, as in "0110"."""
    metrics = {"acc": acc} | ({} if acc_norm is None else {"acc_norm": acc_norm})
    return TaskScore({name: tuple(float(hit) for hit in hits) for name, hits in metrics.items()}, "test", "digest")


def row_of(tasks: Any, label: str, **scores: TaskScore) -> dict[str, Any]:
    return {"label": label, "seconds": 2.0, "tasks": {name: tasks.pack(found) for name, found in scores.items()}}


@pytest.mark.parametrize("hits", ["0", "1", "0001", "0000", "1011001"])
def test_hits_survive_a_file(tasks: Any, hits: str) -> None:
    for found in (score(hits), score(hits, hits[::-1])):
        assert tasks.unpack(json.loads(json.dumps(tasks.pack(found)))) == found


def test_the_bound_is_seen(tasks: Any) -> None:
    row = next(row for row in tasks.ROWS if row.least == 0.95)
    entries = {"FP16": row_of(tasks, "FP16", a=score("1" * 20))}
    for hits, expected in (("1" * 19 + "0", "ok"), ("1" * 18 + "00", "MISSED")):
        entries[row.label] = row_of(tasks, row.label, a=score(hits))
        assert sum(cell.endswith(expected) for cell in tasks.cells(row, entries)) == 2
    lines = tasks.table(list(tasks.ROWS), entries).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


def test_rows_of_tasks_are_recipes_and_known_ones_must_fit(tasks: Any, tmp_path: Path) -> None:
    from mxrot.recipe import load_recipe

    first, *recipes = [row.recipe for row in tasks.ROWS]
    assert first is None and [load_recipe(recipe).name for recipe in recipes] == recipes
    description = dict.fromkeys(tasks.SAME, "same")
    path = tmp_path / "known.json"
    path.write_text(json.dumps(description | {"rows": [row_of(tasks, "rtn", a=score("1"))]}))
    assert list(tasks.known_entries([path], description)) == ["rtn"]
    with pytest.raises(SystemExit, match="does not belong into this table: limit differ"):
        tasks.known_entries([path], description | {"limit": 3})


def test_results_of_several_seeds_are_merged(tasks: Any) -> None:
    """A row's answers are means over seeds; the original's are those of the first file that has them."""

    def result(seed: int, **rows: TaskScore) -> dict[str, Any]:
        found = [row_of(tasks, label, a=hits) | {"recipe": tasks_recipe[label]} for label, hits in rows.items()]
        return dict.fromkeys(tasks.SAME, "same") | {"seed": seed, "machine": "", "command": f"{seed}", "rows": found}

    tasks_recipe = {"FP16": None, "rtn": "rtn", "mxrot": "mxrot"}
    results = [
        result(0, FP16=score("1111"), mxrot=score("1100"), rtn=score("1000")),
        result(2, mxrot=score("1001")),
    ]
    description, entries = tasks.merged(results)
    assert description["seed"] == [0, 2] and description["commands"] == ["0", "2"]
    (found,) = tasks.scores_of(entries["mxrot"]).values()
    assert found == TaskScore({"acc": (1.0, 0.5, 0.0, 0.5)}, "test", "digest")
    assert tasks.scores_of(entries["FP16"])["a"] == score("1111") and "seeds" not in entries["rtn"]
    assert "50.00" in tasks.cells(next(row for row in tasks.ROWS if row.label == "mxrot"), entries)[1]
    with pytest.raises(SystemExit, match="two results are of one seed: 0 0"):
        tasks.merged([results[0], results[0]])
    with pytest.raises(SystemExit, match="results of seeds 0 and 2 differ in limit"):
        tasks.merged([results[0], results[1] | {"limit": 3}])


@pytest.mark.slow
def test_a_table_of_tasks_from_nothing(tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is quantized or asked again."""
    from mxrot.evaluation.harness import Harness

    model, data = write_scorable_model(tmp_path / "tiny"), write_task_folder(tmp_path / "data")
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--data", str(data)]
    options = ["--model", str(model), "--only", "FP16|rtn", "--device", "cpu", "--tasks", "piqa,winogrande"]
    monkeypatch.setattr(sys, "argv", ["tasks.py", *options, *places])
    monkeypatch.setattr(tasks, "write_result", lambda options, description, entries: written.append(dict(entries)))
    written: list[dict[str, Any]] = []
    tasks.main()
    monkeypatch.setattr(Harness, "_loglikelihood_tokens", None)
    tasks.main()
    first, again = written[1], written[-1]
    assert list(first) == ["FP16", "rtn"] and len(written) == 6
    assert [first[label]["tasks"] for label in first] == [again[label]["tasks"] for label in again]
    assert first["rtn"]["quantize_seconds"] == again["rtn"]["quantize_seconds"]


@pytest.mark.parametrize("scope", ["closed form", "block"])
def test_a_shape_alone_is_measured(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "--hidden 64 --ffn 96 --heads 2 --kv-heads 1 --vocabulary 128 --samples 4 --seq-len 32 --blocks 2"
    recipe = "--recipe mxrot --change calibration.generated=0.0 --profile 3"
    if scope == "block":
        recipe += ' --change tuning.scope="block" --change tuning.steps=2'
    monkeypatch.setattr(sys, "argv", ["large.py", *shape.split(), *recipe.split(), "--out", str(tmp_path)])
    imported("large").main()
    assert re.search(r"process 0\ninside +[0-9.]+ s  quantizing/run.py:quantize\n", capsys.readouterr().out)
    (file,) = tmp_path.glob("large_mxrot_*.json")
    result = json.loads(file.read_text())
    assert len(result["block_seconds"]) == 2 and result["seconds"] >= sum(result["block_seconds"])
    assert [len(looks) > 0 for looks in result["tuning"]] == [scope == "block"] * 2


def test_the_stack_of_a_thread_is_sampled() -> None:
    """Functions with what they call, and the line that is innermost; another thread is not seen."""
    sampling = imported("sampling")
    other = threading.Thread(target=_waits, args=(0.4,))
    with sampling.sampled(f"{Path(__file__).parent.name}/") as samples:
        other.start()
        _calls()
    other.join()
    rows = [line.split(maxsplit=3) for line in samples.table(9).splitlines()]
    inside = {place.split(":")[1]: float(seconds) for kind, seconds, _, place in rows if kind == "inside"}
    assert 0.15 < inside["_calls"] < 0.4 and inside["_waits"] <= inside["_calls"]
    assert [place.split()[1] for kind, *_, place in rows if kind == "at"] == ["_waits"]


def _calls() -> None:
    _waits(0.2)


def _waits(seconds: float) -> None:
    time.sleep(seconds)


def test_one_block_is_quantized_and_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of five, of which the second is not looked at."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = f"one_block.py --config {tmp_path} --windows 2 --seq-len 64 --vocabulary 96 --device cpu"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--json", str(tmp_path / "found.json")])
    imported("one_block").main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["config"]["num_hidden_layers"] == 2 and found["config"]["vocab_size"] == 96
    assert "generated = 0" in found["recipe_toml"]
    stages = {stage["stage"]: stage["bytes"] for stage in found["planned"]["stages"]}
    assert found["planned"]["peak_bytes"] == max(stages.values()) and "down: rounding" in stages
    assert found["measured"] == {"peak_bytes": None, "steps": []}


def test_a_long_text_is_read_in_pieces_and_at_once() -> None:
    """By a small model; the tokens in 16 bits are most of its cache."""
    long_context = imported("long_context")
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(tiny_config(head_dim=32, architectures=["LlamaForCausalLM"]))
        .eval()
        .double()
        .requires_grad_(False)
    )
    options = Namespace(model="demo", piece=64, made=5)
    scheme = long_context.scheme_of("mxfp4", "hadamard", 2, 3)
    row = long_context.measure(model, scheme, random_windows(1, 200), options)
    assert row["are_equal"] and row["same_as_one_pass"] == row["same_without_cache"] == 5
    assert 4.25 / 16 < row["share_of_bfloat16"] < 0.5 and model.dtype == torch.float64
    assert "after 200 in pieces of 64, 5 are those" in long_context.described(
        {"format": "mxfp4", "first": 2, "last": 3} | row
    )


def test_text_from_several_devices_is_that_of_one(tmp_path: Path) -> None:
    """Two small ones and main memory, all of them the CPU."""
    spread_text = imported("spread_text")
    source = FolderSource(write_tiny_model(tmp_path / "tiny", num_hidden_layers=4))
    options = Namespace(devices="cpu,cpu", limit="0.0005,0.0002", host=1.0, disk=0.0, windows=3, seq_len=24, alone=True)
    row = spread_text.measure(source, options)
    assert row["are_equal"] and row["tokens"] == 72 and row["spread"]["main_memory"] > 0
    lines = spread_text.described(row).splitlines()
    assert lines[0].startswith("The model that writes the text is spread over cpu, cpu and main memory, ")
    assert lines[2].startswith("on cpu alone: ") and lines[2].endswith("; the same tokens")
    with pytest.raises(SystemExit, match="cpu holds it"):
        spread_text.measure(source, Namespace(**vars(options) | {"limit": "1,1"}))


def test_the_table_of_a_comparison_has_the_caches_where_there_are_some() -> None:
    markdown = imported("markdown")
    row = {
        "recipe": "FP16",
        "perplexity": {"words": 10.0},
        "perplexity_error": {"words": None},
        "ratio_of_text": {"words": 1.0},
        "kl": None,
        "kl_error": None,
        "bits_per_weight": 16.0,
        "transform_bits_per_weight": 0.0,
        "bits_per_kv_element": 16.0,
        "seconds": None,
        "peak_bytes": None,
        "reason": None,
    }
    assert "bits of KV" not in markdown.table([{"rows": [row]}])
    kept = {"bits_per_kv_element": 4.25, "cache": {"ratio": 0.27}, "kl": 0.5, "recipe": "FP16 KV mxfp4"}
    lines = markdown.table([{"rows": [row, row | kept]}]).splitlines()
    assert lines[0] == "|  | words | x | KL | bits | bits of KV | cache x | seconds | GB |"
    assert lines[2] == "| FP16 | 10.00 | 1.000 |  | 16.00 | 16.00 |  |  |  |"
    assert lines[3] == "| FP16 KV mxfp4 | 10.00 | 1.000 | 0.500 | 16.00 | 4.25 | 0.270 |  |  |"


def test_heads_are_measured_as_checkpoints_have_them_and_their_products_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tiny_model(tmp_path / "tiny", tie_word_embeddings=True)
    (tmp_path / "words.txt").write_text("".join(f"the number {n} follows {n - 1}; " for n in range(99)))
    words = f"--model {source} --text words={tmp_path / 'words.txt'} --recipes rtn --heads mxint8,mxfp4/mxfp4"
    words += " --windows 3 --seq-len 64 --shape 64 96 --rows 1 5 --device cpu"
    monkeypatch.setattr(sys, "argv", ["head.py", *words.split(), "--json", str(tmp_path / "found.json")])
    imported("head").main()
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["recipe"], row["head"]): row for row in found["accuracy"]}
    assert len(rows) == 6 and rows["as it was", "as it was"]["kl"] == 0
    for head, changes in {
        "as it was": {},
        "mxint8": {"head.format": "mxint8"},
        "mxfp4/mxfp4": {"head.format": "mxfp4", "head.inputs": "mxfp4", "head.transform": "hadamard"},
    }.items():
        mxrot.quantize(source, mxrot.Recipe.load("rtn").changed(changes), tmp_path / "out", force=True, device="cpu")
        options: Any = {"text": f"words={tmp_path / 'words.txt'}", "windows": 3, "seq_len": 64, "device": "cpu"}
        expected = mxrot.diverge(tmp_path / "out", source, **options)["words"]
        row = rows["rtn", head]
        assert row["kl"] == pytest.approx(expected.kl, rel=1e-4) and row["ppl"] == pytest.approx(expected.ppl, rel=1e-6)
    assert [row["head"] for row in found["speed"]] == ["bf16", "mxint8", "mxfp4/mxfp4"] * 2
    assert all(row["is_right"] and row["seconds"]["median"] > 0 for row in found["speed"])
    head = imported("head")
    monkeypatch.setattr(head, "MOST_ERROR", 0.0)
    with pytest.raises(SystemExit):
        head.main()
    assert "mxint8 (None), 1 rows: RED, error " in capsys.readouterr().out
    red = json.loads((tmp_path / "found.json").read_text())["speed"]
    assert [row["seconds"] is None for row in red] == [False, True, True] * 2
