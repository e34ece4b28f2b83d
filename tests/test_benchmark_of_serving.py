"""benchmarks/serving.py, another program in the place of vLLM: perplexities are mxrot's own, figures add up."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import mxrot
from mxrot.evaluation.perplexity import perplexity
from mxrot.kernels import Choice
from mxrot.layers import HeadLinear
from mxrot.recipe import load_recipe
from mxrot.vllm.verdict import check_for_vllm

FOLDER = Path(__file__).parent.parent / "benchmarks"

PROGRAM = '''
"""Stands for vLLM: log-probabilities of prompts are those of transformers, new tokens are 7, and take no time."""
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM

def SamplingParams(**options):
    return SimpleNamespace(**({"prompt_logprobs": None} | options))

class LLM:
    def __init__(self, model, **options):
        if options.get("quantization"):
            raise RuntimeError("no such kernel")
        assert options["trust_remote_code"] is False and options["enable_chunked_prefill"]
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = SimpleNamespace(get_vocab_size=lambda: self.model.config.vocab_size)
        self.llm_engine = SimpleNamespace(model_config=config)

    @torch.no_grad()
    def generate(self, prompts, sampling, use_tqdm):
        found = []
        for prompt, one in zip(prompts, sampling, strict=True):
            tables = None
            if one.prompt_logprobs is not None:
                ids = prompt["prompt_token_ids"]
                logs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
                tables = [None] + [
                    {token: SimpleNamespace(logprob=float(row[token]))} for row, token in zip(logs, ids[1:])
                ]
            output = SimpleNamespace(token_ids=[7] * one.max_tokens)
            found.append(SimpleNamespace(prompt_logprobs=tables, outputs=[output]))
        return found
'''


def imported(name: str) -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def serving() -> Any:
    return imported("serving")


@pytest.fixture(scope="module")
def figures() -> Any:
    return imported("serving_figures")


def tables_of(logits: Tensor, ids: list[int]) -> list[Any]:
    """As vLLM gives them, with the likeliest token beside."""
    logs = logits.float().log_softmax(-1)
    found: list[Any] = [None]
    for row, token in zip(logs, ids[1:], strict=False):
        found.append({int(row.argmax()): SimpleNamespace(logprob=float(row.max()))})
        found[-1][token] = SimpleNamespace(logprob=float(row[token]))
    return found


def test_perplexity_is_that_of_mxrot(figures: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "model"), dtype=torch.float32)
    windows = random_windows(3, 24)
    with torch.no_grad():
        logits = model(windows).logits
    means = [figures.window_mean(tables_of(rows, ids), ids) for rows, ids in zip(logits, windows.tolist(), strict=True)]
    expected = perplexity(model, windows)
    found = figures.perplexity_of(means, 24)
    # Sums of 23 float32 numbers of at most 8, against float64 ones.
    assert found.nll == pytest.approx(expected.nll, abs=23 * 8 * 2.0**-24)
    assert (found.windows, found.tokens, found.seq_len) == (expected.windows, expected.tokens, expected.seq_len)


def test_log_probabilities_of_other_tokens_are_an_error(figures: Any) -> None:
    one = SimpleNamespace(logprob=-1.0)
    assert figures.window_mean([None, {5: one}, {6: SimpleNamespace(logprob=-3.0)}], [4, 5, 6]) == 2.0
    with pytest.raises(ValueError, match="2 log-probabilities of 3 tokens"):
        figures.window_mean([None, {5: one}], [4, 5, 6])
    with pytest.raises(KeyError):
        figures.window_mean([None, {5: one}], [4, 6])


def test_texts_are_compared_up_to_the_first_token_that_differs(figures: Any) -> None:
    assert figures.equal_tokens([[1, 2, 3], [9, 2, 3], [1, 2, 9]], [[1, 2, 3]] * 3) == [3, 0, 2]


def test_the_table_compares_with_bf16(figures: Any) -> None:
    base = {"nlls": [1.0, 2.0], "greedy": [[1, 2]], "decode": {"8": 100.0}, "first_token": {"2048": 0.2}}
    ours = {"nlls": [1.1, 2.1], "greedy": [[1, 3]], "decode": {"8": 171.0}, "first_token": {"2048": 0.1}}
    own = {"eval_nlls": [1.0, 2.0]}
    stock = {"errors": {"speed mixed batch": "x"}, "kernel": "Marlin"}
    rows = figures.table({"bf16": base | own, "plugin": ours | own, "stock": stock})
    found = {row[0]: row[1:] for row in rows if row[0]}
    ratio = math.exp(0.1)
    assert found["perplexity"] == [f"{math.exp(1.5):.3f}", f"{math.exp(1.6):.3f} ({ratio:.3f} +- 0.000)", ""]
    assert found["8 requests, tokens/s"] == ["100", "171 (1.71)", ""]
    assert found["first token of 2048, ms"] == ["200.0", "100.0 (2.00)", ""]
    assert found["greedy tokens as bf16"] == ["", "1", ""] and "mixed batch, tokens/s" not in found
    assert found["by mxrot eval"] == ["4.482 (1.0000 +- 0.0000)", f"4.482 ({ratio:.4f} +- 0.0000)", ""]
    assert found["failed"] == ["", "", "speed mixed batch"] and found["linears by"] == ["", "", "Marlin"]
    assert not {"head by", "perplexity over plugin W4A4"} & found.keys()
    lines = figures.text_of(rows).splitlines()
    assert len(lines) == len(rows) and lines[0].split() == ["bf16", "plugin", "stock"]


def test_the_table_compares_a_quantized_head_with_the_plugin(figures: Any) -> None:
    """On the same windows, beside the comparison with bf16."""
    name = "plugin W4A4, head mxint8"
    ways: dict[str, Any] = {"bf16": {"nlls": [1.0, 2.0]}, "plugin W4A4": {"nlls": [1.1, 2.1]}}
    ways[name] = {"nlls": [1.101, 2.103], "head": "MxrotHeadMethod, codes", "decode": {"1": 400.0}}
    found = {row[0]: row[1:] for row in figures.table(ways)}
    assert found[""] == ["bf16", "plugin W4A4", name]
    # Log ratios of .001 and .003: a mean of .002, and a standard error of half their difference.
    assert found["perplexity over plugin W4A4"] == ["", "", f"{math.exp(0.002):.4f} +- {math.exp(0.002) * 0.001:.4f}"]
    assert found["head by"] == ["", "", "MxrotHeadMethod, codes"] and found["1 requests, tokens/s"][2] == "400"
    del ways["plugin W4A4"]
    assert "perplexity over plugin W4A4" not in {row[0] for row in figures.table(ways)}


def test_prompts_that_have_no_positions_are_left_out(serving: Any) -> None:
    assert serving.fitting_prompts([2048, 8064], 8192) == [2048, 8064]
    assert serving.fitting_prompts([2048, 8064], 8064) == [2048]
    assert serving.fitting_prompts([2048], None) == [2048]


def test_what_the_processes_of_a_way_have_measured_is_put_together(figures: Any) -> None:
    speed = {
        "decode": {"8": 100.0},
        "start_seconds": 9.0,
        "kernel": "M",
        "head": "H",
        "errors": {"mixed batch": "y"},
        "is_done": True,
    }
    text = {"nlls": [1.0], "start_seconds": 5.0, "kernel": "N", "head": "I", "is_done": True}
    ways = figures.merged(
        [("a", "speed", speed), ("a", "text", text), ("a", "eval", {"error": "x"}), ("b", "text", text)]
    )
    assert ways["a"] == {
        "decode": {"8": 100.0},
        "start_seconds": 9.0,
        "kernel": "M",
        "head": "H",
        "nlls": [1.0],
        "errors": {"speed mixed batch": "y", "eval": "x"},
    }
    assert ways["b"] == {"nlls": [1.0], "start_seconds": 5.0, "kernel": "N", "head": "I"}


def test_kernels_that_were_compiled_late(figures: Any) -> None:
    said = "Triton kernel JIT compilation during inference: {}. This causes a latency spike; consider extending"
    log = "\n".join(said.format(name) for name in ("_values", "_packed_product (BLOCK=64)", "_values"))
    assert figures.late_kernels(f"INFO started\n{log}\n") == ["_values", "_packed_product"]
    assert figures.late_kernels("INFO started\n") == []
    both = [("a", "speed", {"late_kernels": ["x"]}), ("a", "text", {"late_kernels": ["y", "x"]}), ("b", "speed", {})]
    ways = figures.merged(both)
    assert ways == {"a": {"late_kernels": ["x", "y"]}, "b": {}}
    assert ["compiled late", "x y", ""] in figures.table(ways)


def test_sizes_of_graphs(serving: Any) -> None:
    assert serving.graph_sizes([1, 8, 48]) == [1, 2, 4, 8, 16, 32, 48]
    assert serving.graph_sizes([]) == [1, 2, 4, 8, 16, 32]
    assert serving.graph_sizes([256])[-2:] == [128, 256]


def test_speeds_of_random_models_beside_texts_of_others(serving: Any, random_models: Path, tmp_path: Path) -> None:
    original = write_tiny_model(tmp_path / "model")
    words = ["--original", str(original), "--checkpoint", str(original), "--random", str(random_models)]
    options = serving.parse_options([*words, "--together", "--kv-gib", "0.5", "--prompts", "128,9000"])
    jobs = {job.name: job for job in serving.jobs_of(options, [[1, 2, 3]])}
    expected = ["bf16-speed", "stock-W4A16-speed", "plugin-W4A4-speed"]
    expected += ["plugin-W4A4-head-mxfp4-mxfp4-speed", "plugin-W4A4-head-mxint8-speed", "bf16-text", "bf16-eval"]
    assert list(jobs) == [*expected, "plugin-W4A4-text", "plugin-W4A4-eval"]
    speed, text = jobs["plugin-W4A4-speed"], jobs["plugin-W4A4-text"]
    assert speed.task["windows"] == [] and speed.task["prompts"] == [128] and speed.plugins == text.plugins == "mxrot"
    assert text.task["windows"] == [[1, 2, 3]] and text.task["prompts"] == text.task["requests"] == []
    engine = speed.task["options"]
    assert engine["kv_cache_memory_bytes"] == 2**29 and engine["gpu_memory_utilization"] == serving.SMALL_SHARE
    assert "attention_config" not in engine
    options = serving.parse_options(["--random", str(random_models), "--attention", "TRITON_ATTN", "--eager"])
    for job in serving.jobs_of(options, []):
        assert job.task["options"]["attention_config"] == {"backend": "TRITON_ATTN"}
        assert job.task["options"]["enforce_eager"] and "compilation_config" not in job.task["options"]
    assert engine["skip_tokenizer_init"] and engine["compilation_config"]["cudagraph_capture_sizes"][-1] == 256
    assert jobs["bf16-speed"].task["options"]["load_format"] == "dummy"
    assert jobs["stock-W4A16-speed"].task["options"]["linear_backend"] == "marlin"


def test_random_models_are_checkpoints(random_models: Path) -> None:
    """Of one set of weights; stock vLLM runs one of them as it is, the plugin both."""
    stock, plugin = (check_for_vllm(random_models / name) for name in ("stock", "plugin"))
    assert not stock.stock.stops and not stock.stock.needs_export and not plugin.plugin.stops and plugin.stock.stops
    for name in ("block-0", "block-1", "rest", "head"):
        first, second = (random_models / folder / f"{name}.safetensors" for folder in ("stock", "plugin"))
        assert first.samefile(second)
    logits = mxrot.load(random_models / "plugin")(torch.arange(8)[None]).logits
    assert logits.isfinite().all() and 0.1 < float(logits.std()) < 10


def test_a_random_model_with_a_head_in_codes_is_the_plugin_s_but_for_the_head(random_models: Path) -> None:
    """The rounding of MXINT8 is uniform: at most 2^-7 / sqrt(3) of a power of two, which is at most the largest of 32
    normal numbers, about twice their standard deviation. MXFP4 rounds weights and inputs by a tenth each."""
    tokens = torch.arange(8)[None]
    expected = mxrot.load(random_models / "plugin")(tokens).logits
    for formats, most in (("mxint8", 2**-6), ("mxfp4-mxfp4", 0.25)):
        folder = random_models / f"plugin-head-{formats}"
        report = check_for_vllm(folder)
        assert not report.plugin.stops and report.stock.stops
        for name in ("block-0", "block-1", "rest"):
            file = f"{name}.safetensors"
            assert (folder / file).samefile(random_models / "plugin" / file)
        model = mxrot.load(folder)
        assert isinstance(model.lm_head, HeadLinear)
        error = (model(tokens).logits - expected).norm() / expected.norm()
        assert 1e-3 < float(error) < most, formats


@pytest.fixture(scope="module")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    shape = ["--blocks", "2", "--hidden", "64", "--ffn", "128", "--heads", "4", "--kv-heads", "2", "--vocabulary", "96"]
    heads = ["--head", "mxint8", "--head", "mxfp4/mxfp4"]
    assert imported("serving_random").main([str(folder), *shape, *heads]) == 0
    return folder


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a checkpoint of it with a quantized head."""
    folder = tmp_path_factory.mktemp("headed")
    model = write_tiny_model(folder / "model", torch.float32)
    recipe = load_recipe("rtn").changed({"head.format": "mxint8"})
    mxrot.quantize(model, recipe, output=folder / "model-head", device="cpu")
    return model, folder / "model-head"


def test_a_quantized_head_is_one_more_way(
    serving: Any, headed: tuple[Path, Path], random_models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """For the plugin, timed with random weights where those are given, named by its formats."""
    original, checkpoint = map(str, headed)
    words = ["--original", original, "--head-checkpoint", checkpoint]
    options = serving.parse_options(words)
    jobs = {job.name: job for job in serving.jobs_of(options, [[1, 2, 3]])}
    name = "plugin-W4A4-head-mxint8"
    assert list(jobs) == ["bf16-speed", "bf16-eval", f"{name}-speed", f"{name}-eval"]
    assert jobs[f"{name}-speed"].way == "plugin W4A4, head mxint8" and jobs[f"{name}-speed"].plugins == "mxrot"
    assert jobs[f"{name}-speed"].task["options"]["model"] == jobs[f"{name}-eval"].task["options"]["model"] == checkpoint
    options = serving.parse_options([*words, "--random", str(random_models)])
    both = {job.name: job.task["options"]["model"] for job in serving.jobs_of(options, [[1, 2, 3]])}
    assert both[f"{name}-speed"] == str(random_models / "plugin-head-mxint8") and both[f"{name}-text"] == checkpoint
    found = serving.described(options, words)
    assert found["heads"]["plugin W4A4, head mxint8"] == "weights mxint8 even, inputs in 16 bit, no transform"
    assert found["heads"]["plugin W4A4, head mxfp4/mxfp4"].endswith("inputs mxfp4 even, block-diagonal")
    assert found["models"]["plugin W4A4, head mxint8"] == "model-head"
    bare = tmp_path / "random"
    bare.mkdir()
    for wrong, said in (
        (["--original", original, "--head-checkpoint", original], "not a checkpoint written by mxrot"),
        (["--original", original, "--head-checkpoint", str(random_models / "plugin")], "its head is not quantized"),
        ([*words, "--head-checkpoint", checkpoint], "is in mxint8, too; leave one out"),
        ([*words, "--random", str(bare)], "head mxint8: .* has no such model; give its format to serving_random.py"),
        (["--head-checkpoint", checkpoint], "give --original, --random or both"),
        (["--head-checkpoint", checkpoint, "--random", str(random_models)], "need --original"),
    ):
        with pytest.raises(SystemExit):
            serving.parse_options(wrong)
        assert re.search(said, capsys.readouterr().err), said
    assert serving.without_paths([*words]).endswith("--original model --head-checkpoint model-head")


def test_what_computes_the_head_is_named(headed: tuple[Path, Path]) -> None:
    head_of = imported("serving_worker").head_of
    method = type("MxrotHeadMethod", (), {})()

    def engine(**head: Any) -> Any:
        model = SimpleNamespace(lm_head=SimpleNamespace(quant_method=method, **head))
        runner = SimpleNamespace(get_model=lambda: model)
        worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
        return SimpleNamespace(llm_engine=SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker)))

    assert head_of(engine(quantized=mxrot.load(headed[1]).lm_head)) == "MxrotHeadMethod, plain"
    assert head_of(engine(quantized=SimpleNamespace(choose_path=lambda rows: Choice("codes", "")))).endswith(", codes")
    assert head_of(engine()) == "MxrotHeadMethod" and head_of(SimpleNamespace()) == ""


def job_of(jobs: Any, folder: Path, name: str, kind: str, body: str) -> Any:
    """One that runs `body` with its task, and tells by a file when it begins and ends."""
    script = folder / f"{name}-{kind}.py"
    script.write_text(
        "import json, sys, time\nfrom pathlib import Path\n"
        "task = json.loads(Path(sys.argv[1]).read_text())\n"
        "def keep(**found):\n"
        "    Path(task['result'] + '.new').write_text(json.dumps(found))\n"
        "    Path(task['result'] + '.new').replace(task['result'])\n" + body
    )
    return jobs.Job(name, kind, str(script), {"options": {}})


TURN = """
keep(start_seconds=1.0)
while not Path(task["go"]).exists():
    time.sleep(0.01)
begun = time.monotonic()
time.sleep(0.3)
keep(start_seconds=1.0, turn=[begun, time.monotonic()], is_done=True)
"""


def test_jobs_together_take_turns(tmp_path: Path) -> None:
    jobs = imported("serving_jobs")
    text = job_of(jobs, tmp_path, "a", "text", "time.sleep(0.5)\nkeep(ended=time.monotonic(), is_done=True)\n")
    broken = job_of(jobs, tmp_path, "b", "speed", "raise RuntimeError('x')\n")
    hanging = job_of(jobs, tmp_path, "c", "text", "keep(half=1)\ntime.sleep(600)\n")
    first, second = (job_of(jobs, tmp_path, name, "speed", TURN) for name in "de")
    crew = jobs.Crew(
        [text, broken, hanging, first, second], jobs.Limits(10, 600), tmp_path, lambda job: tmp_path / f"{job.name}.log"
    )
    ended: list[str] = []
    crew.told = lambda job: ended.append(job.name)
    crew.run(together=True)
    assert sorted(ended) == ["a-text", "b-speed", "c-text", "d-speed", "e-speed"]
    assert ended[-2:] == ["d-speed", "e-speed"]
    assert broken.found() == {"error": "ended without a result"}
    assert hanging.found() == {"half": 1, "error": "ended after 10 s"} and not hanging.is_running
    turns = first.found()["turn"] + second.found()["turn"]
    assert text.found()["ended"] < turns[0] and turns == sorted(turns)


def test_jobs_one_by_one_end_with_the_time_for_all(tmp_path: Path) -> None:
    jobs = imported("serving_jobs")
    done = job_of(jobs, tmp_path, "a", "speed", "keep(x=1, is_done=True)\n")
    hanging = job_of(jobs, tmp_path, "b", "speed", "time.sleep(600)\n")
    late = job_of(jobs, tmp_path, "c", "speed", "keep(x=1, is_done=True)\n")
    crew = jobs.Crew([done, hanging, late], jobs.Limits(600, 4), tmp_path, lambda job: tmp_path / f"{job.name}.log")
    crew.run(together=False)
    assert done.found() == {"x": 1, "is_done": True} and late.found() == {}
    assert hanging.found()["error"].startswith("ended after ") and not hanging.is_running


def test_options(serving: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = serving.parse_options(["--original", "a", "--checkpoint", "b", "--tensor-parallel", "2"])
    assert options.requests == [1, 8, 32, 64, 128, 256] and options.prompts == [2048, 8064]
    assert list(serving.ways_of(options)) == ["bf16", "plugin W4A4"] and options.tensor_parallel == 2
    assert serving.parse_options(["--random", "r"]).original is None
    for words in (
        [],
        ["--original", "a"],
        ["--random", "r", "--stock", "b"],
        ["--random", "r", "--together"],
        ["--random", "r", "--together", "--kv-gib", "8", "--tensor-parallel", "2"],
        ["--original", "a", "--stock", "b", "--requests", "0"],
    ):
        with pytest.raises(SystemExit):
            serving.parse_options(words)
    capsys.readouterr()


def test_a_command_is_kept_without_paths(serving: Any) -> None:
    words = ["--original", "/home/x/model", "--text=/data/a.txt", "--windows", "4"]
    assert serving.without_paths(words).endswith("serving.py --original model --text=a.txt --windows 4")


@pytest.mark.slow
def test_a_run_from_folders_to_table_and_file(
    serving: Any,
    headed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each way in a process of its own; one that fails leaves the others their figures."""
    program = tmp_path / "program" / "vllm"
    program.mkdir(parents=True)
    (program / "__init__.py").write_text(PROGRAM)
    (program / "inputs.py").write_text("def TokensPrompt(**keys):\n    return keys\n")
    monkeypatch.setenv("PYTHONPATH", f"{program.parent}:{FOLDER.parent / 'src'}:{FOLDER.parent}")
    model, checkpoint = headed
    (tmp_path / "text.txt").write_text("".join(f"the number {number} follows; " for number in range(300)))
    words = ["--out", str(tmp_path / "out")]
    for option in ("--original", "--checkpoint", "--stock"):
        words += [option, str(model)]
    words += ["--head-checkpoint", str(checkpoint)]
    words += ["--text", str(tmp_path / "text.txt"), "--windows", "3", "--seq-len", "64", "--requests", "1,4"]
    assert serving.main([*words, "--prompts", "64,100000", "--repeats", "1"]) == 1
    said = capfd.readouterr()
    assert "stock W4A16 (speed): RuntimeError: no such kernel" in said.err
    (path,) = (tmp_path / "out").glob("serving_*.json")
    text = path.read_text()
    assert str(tmp_path) not in text and str(model.parent) not in text
    found = json.loads(text)
    name = "plugin W4A4, head mxint8"
    assert found["models"] == {"bf16": "model", "stock W4A16": "model", "plugin W4A4": "model", name: "model-head"}
    ways = found["ways"]
    assert ways["stock W4A16"] == {"errors": {"speed": "RuntimeError: no such kernel"}}
    for way in (ways["bf16"], ways["plugin W4A4"], ways[name]):
        assert list(way["decode"]) == ["1", "4"] and list(way["first_token"]) == list(way["mixed"]) == ["64"]
        assert way["nlls"] == pytest.approx(way["eval_nlls"], rel=1e-5) and len(way["nlls"]) == 3
    assert ways["bf16"]["nlls"] == ways["plugin W4A4"]["nlls"] != ways[name]["nlls"]
    assert "4 requests, tokens/s" in said.out and "failed" in said.out and name in said.out.splitlines()[0]
