"""A plan from a config: what it finds, what it refuses, and that it is quick."""

from __future__ import annotations

import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config, write_tiny_model
from tests.unit.checkpoint.folders import recipe, write
from tests.unit.planning.shapes import LLAMA_3_8B, LLAMA_3_70B, LLAMA_3_405B
from transformers import GPT2Config, Qwen2Config

from mxrot.errors import ConfigError, FamilyError
from mxrot.planning import Machine, OtherRates, Plan, gigabytes, make_plan, plan, rates
from mxrot.planning.writing import STREAMING
from mxrot.recipe import Recipe
from mxrot.report import plan_report

CPU = Machine(torch.device("cpu"))


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SECONDS", 0.0)


def plan_of(tmp_path: Path, config: Any, chosen: Recipe, machine: Machine = CPU, **options: Any) -> Plan:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(config.to_dict()))
    return make_plan("some/model", path, chosen, machine, **options)


@pytest.mark.parametrize("config", [LLAMA_3_70B, LLAMA_3_405B], ids=["70B", "405B"])
def test_large_models_take_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    started = time.process_time()
    made = plan_of(tmp_path, config, recipe("duquant++"), Machine(torch.device("cpu"), 80e9))
    assert time.process_time() - started < 30
    assert not made.problems and made.sizes is not None and made.needs is not None and made.time is not None
    assert made.sizes.before == 2 * {80: 70553706496, 126: 405853388800}[config.num_hidden_layers]
    assert made.sizes.after.bits_per_weight == 4.25


def test_a_405b_model_does_not_fit_as_a_whole(tmp_path: Path) -> None:
    """Tuning needs it on the GPU; to write text it is spread."""
    chosen = recipe("mxrot-tuned", tuning__generated=0.0)
    (problem,) = plan_of(tmp_path, LLAMA_3_405B, chosen, Machine(torch.device("cpu"), 80e9)).problems
    assert problem == (
        "recipe mxrot-tuned runs the whole original model on cuda: that takes 811.7 GB, and 80.0 GB are free; "
        'set tuning.scope = "block"'
    )
    (problem,) = plan_of(tmp_path, LLAMA_3_405B, recipe("mxrot"), Machine(torch.device("cpu"), 10e9)).problems
    assert problem.startswith("recipe mxrot: the original model, which is to write calibration text, takes 811.7 GB")
    assert problem.endswith("give a text of your own, and set calibration.generated = 0")


@pytest.mark.parametrize(("processes", "where"), [(1, "cuda:0 and main memory"), (2, "cuda:0, cuda:1 and main memory")])
def test_text_of_a_model_that_no_gpu_holds(tmp_path: Path, processes: int, where: str) -> None:
    """141 GB of weights: where they lie, what each device takes, and how long they are on their way."""
    here = plan_of(tmp_path, LLAMA_3_8B, recipe("mxrot"), CPU).as_table()
    here["seconds"] |= {"device": "A machine", "kind": "cuda"}
    (tmp_path / "rates.json").write_text(json.dumps(here))
    machine = Machine(torch.device("cpu"), 80e9, OtherRates.read(tmp_path / "rates.json"))
    made = plan_of(tmp_path, LLAMA_3_70B, recipe("mxrot"), machine, processes=processes)
    spread = made.spread
    assert not made.problems and spread is not None and made.needs is not None and made.time is not None
    assert made.warnings[0] == spread.said and f"is spread over {where}, {spread.at_once} seq" in spread.said
    stage = {stage.name: stage for stage in made.needs.gpu.stages}["writing calibration text"]
    assert stage.terms == spread.terms(0) and "the original model" not in stage.terms
    assert made.needs.gpu.peak.total <= 80e9
    waiting = {stage.name: stage.terms for stage in made.needs.gpu_host.stages}["writing calibration text"]
    assert waiting["blocks of the original model"] == spread.streamed > 80e9
    on_devices = sum(spread.terms(device)["blocks of the original model"] for device in spread.used)
    assert on_devices + spread.streamed + spread.sizes.outer == made.sizes.before if made.sizes else False
    assert made.time.terms[STREAMING] == spread.seconds_to_stream > 60
    table = json.loads(json.dumps(made.as_table()))["text_spread"]
    assert list(table["devices"]) == [f"cuda:{number}" for number in range(processes)]
    assert table["main_memory"] == spread.streamed and table["disk"] == 0
    lines = "\n".join(line for line in plan_report(made) if isinstance(line, str))
    comes = f"weights that come in each of {spread.steps} passes: {gigabytes(spread.streamed)} in main memory"
    assert f"writing text, {comes}" in lines
    assert f"writing text, cuda:{processes - 1}: " in lines and spread.said in lines


def test_nothing_is_spread_that_a_gpu_holds(tmp_path: Path) -> None:
    made = plan_of(tmp_path, LLAMA_3_8B, recipe("mxrot"), Machine(torch.device("cpu"), 80e9), processes=4)
    assert made.spread is None and made.as_table()["text_spread"] is None
    alone = plan_of(tmp_path, LLAMA_3_70B, recipe("mxrot", calibration__generated=0.0), Machine(CPU.device, 80e9))
    assert alone.spread is None and not alone.problems


def test_the_time_on_another_machine(tmp_path: Path) -> None:
    """Which computes on a GPU, three times as fast as this one in everything."""
    here = plan_of(tmp_path, LLAMA_3_8B, recipe("mxrot"), CPU)
    table = json.loads(json.dumps(here.as_table()))
    table["seconds"] |= {"device": "A machine", "kind": "cuda"}
    for factor in (1.0, 3.0):
        told = dict(table["seconds"], rates={name: factor * rate for name, rate in table["seconds"]["rates"].items()})
        (tmp_path / f"{factor:.0f}.json").write_text(json.dumps({"seconds": told}))
    one, three = (
        plan_of(tmp_path, LLAMA_3_8B, recipe("mxrot"), Machine(CPU.device, other=OtherRates.read(tmp_path / name)))
        for name in ("1.json", "3.json")
    )
    assert (one.device, one.kind) == ("A machine", "cuda") and one.time is not None and three.time is not None
    for name, seconds in one.time.terms.items():
        if name not in ("files", "starting", "states to main memory and back"):
            assert three.time.terms[name] == pytest.approx(seconds / 3)
    assert one.as_table()["seconds"]["rates"] == table["seconds"]["rates"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "holds no rates; expected what `mxrot plan --json` writes"),
        ("[]", "holds no rates"),
        ('{"seconds": null}', "holds no rates"),
        ('{"seconds": {"device": "a", "kind": "cpu", "rates": {"product": 1e9}}}', "holds no rates"),
        ('{"seconds": {"device": "a", "kind": "npu", "rates": RATES}}', "of cpu or cuda"),
        ('{"seconds": {"device": "a", "kind": "cpu", "rates": ZEROS}}', "have to be positive"),
    ],
)
def test_what_holds_no_rates(tmp_path: Path, text: str, said: str) -> None:
    for word, value in (("RATES", 1.0), ("ZEROS", 0.0)):
        text = text.replace(word, json.dumps({field.name: value for field in fields(rates.Rates)}))
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        OtherRates.read(tmp_path / "rates.json")


def test_states_that_lie_on_disk_are_told_and_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4.3 GB in float32 between two blocks of 8B, up to six times: more than half of 50 GB, less than half of 60."""
    machine = Machine(torch.device("cpu"))
    for available, is_told in ((60e9, False), (50e9, True)):
        monkeypatch.setattr(plan, "available_memory", lambda available=available: available)
        told = plan_of(tmp_path, LLAMA_3_8B, recipe("duquant++-gptq"), machine).warnings
        assert [line for line in told if "will lie on disk" in line] == [
            "12.9 GB of states between decoder blocks will lie on disk, in the folder of temporary files ($TMPDIR)"
        ] * is_told


def test_a_warning_where_memory_is_short_without_a_check(tmp_path: Path) -> None:
    for free, is_short in ((6e9, True), (80e9, False)):
        made = plan_of(tmp_path, LLAMA_3_8B, recipe("duquant++-gptq"), Machine(torch.device("cpu"), free))
        assert not made.problems
        assert bool([line for line in made.warnings if line.startswith("the GPU will run out")]) == is_short


def test_all_problems_at_once(tmp_path: Path) -> None:
    chosen = recipe("duquant++-released", smoothing__skip=["mlp"])
    made = plan_of(tmp_path, tiny_config(architectures=["LlamaForCausalLM"], intermediate_size=100), chosen)
    expected = ("8-bit levels", "no site 'mlp'", "in_features 100")
    assert all(part in line for part, line in zip(expected, made.problems, strict=True))
    assert made.problems[2].startswith("model.layers.*.mlp.down_proj:")
    assert made.problems[2].endswith("(2 decoder blocks)")


def test_a_model_of_no_family_has_a_plan_that_says_so(tmp_path: Path) -> None:
    made = plan_of(tmp_path, GPT2Config(architectures=["GPT2LMHeadModel"]), recipe("rtn"))
    assert len(made.problems) == 1 and "of no known family" in made.problems[0]
    assert made.sizes is None and made.as_table()["sites"] == []
    json.dumps(made.as_table())


def test_a_checkpoint_is_quantized_already(tmp_path: Path) -> None:
    write(write_tiny_model(tmp_path / "tiny"), tmp_path / "out", recipe("rtn"))
    made = make_plan("out", tmp_path / "out", recipe("rtn"), CPU)
    assert "is quantized already" in made.problems[0]


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match=r"no config\.json"):
        make_plan("x", tmp_path, recipe("rtn"), CPU)


def test_the_type_of_the_weights(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16", None):
        made = plan_of(tmp_path, tiny_config(architectures=["LlamaForCausalLM"], dtype=dtype), recipe("rtn"))
        assert made.sizes is not None
        sizes[dtype] = made.sizes.before
        assert bool([line for line in made.warnings if "16 bits are assumed" in line]) == (dtype is None)
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 2 * sizes[None]


QWEN = Qwen2Config(
    architectures=["Qwen2ForCausalLM"],
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50},
)


@pytest.mark.parametrize(
    ("config", "name", "stops"),
    [
        (LLAMA_3_8B, "rtn", None),
        (LLAMA_3_8B, "mxrot", "one matrix a block, and vLLM takes one a site"),
        (LLAMA_3_8B, "duquant++", None),
        (QWEN, "duquant++", "q_proj has a bias, which vLLM does not take beside a transform"),
    ],
)
def test_what_vllm_does_with_it(tmp_path: Path, config: Any, name: str, stops: str | None) -> None:
    made = plan_of(tmp_path, config, recipe(name))
    assert made.vllm is not None and made.vllm.plugin.stops == ()
    assert made.vllm.stock.stops == () if stops is None else stops in made.vllm.stock.stops[0]
    assert made.as_table()["vllm"]["stock"]["needs_export"] == (name == "duquant++" and stops is None)


def test_vllm_is_not_asked_about_what_is_refused(tmp_path: Path) -> None:
    made = plan_of(tmp_path, LLAMA_3_8B, recipe("duquant++-released"))
    assert made.problems and made.vllm is None and made.as_table()["vllm"] is None


def test_the_table_holds_every_stage_and_sums_up(tmp_path: Path) -> None:
    made = plan_of(tmp_path, tiny_config(architectures=["LlamaForCausalLM"]), recipe("mxrot"), samples=4, seq_len=32)
    table = json.loads(json.dumps(made.as_table()))
    assert table["windows"] == [4, 32] and table["refused"] == []
    for found in table["memory"].values():
        assert found["peak_bytes"] == max(stage["bytes"] for stage in found["stages"])
        for stage in found["stages"]:
            assert abs(sum(stage["terms"].values()) - stage["bytes"]) <= len(stage["terms"])
    assert table["seconds"]["total"] == pytest.approx(sum(table["seconds"]["terms"].values()), abs=0.1)
    assert sum(site["weights"] for site in table["sites"]) == table["size"]["after"]["quantized_weights"]
