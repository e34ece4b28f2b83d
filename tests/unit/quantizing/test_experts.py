"""Quantizing experts: what their rounding sees, what is recorded, and that nothing is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import EXPERT_MODELS, random_windows, write_tiny_mixture
from tests.unit.checkpoint.folders import all_tensors, digests, logits, recipe, without_run, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import mxrot
from mxrot.calibration import site_weights
from mxrot.errors import ConfigError
from mxrot.layers import QuantLinear, prepare_linears, separate_experts
from mxrot.models import WeightFiles, find_family, read_config
from mxrot.quantizing import run as pipeline
from mxrot.recipe import Recipe
from mxrot.rounding.gptq import GPTQ
from mxrot.transforms import moments
from mxrot.vllm.verdict import check_for_vllm

WINDOWS = random_windows(60, 32)
EACH = ["rtn", "hadamard", "smoothquant", "duquant++", "duquant++-gptq", "mxrot", "mxrot-vllm", "duquant"]
each_kind = pytest.mark.parametrize("kind", EXPERT_MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_tiny_mixture(tmp_path_factory.mktemp(kind) / "tiny", kind) for kind in EXPERT_MODELS}


def chosen_of(name: str, **changes: Any) -> Recipe:
    on_text_alone = {"calibration__generated": 0.0} if name.startswith("mxrot") else {}
    return recipe(name, **(on_text_alone | changes))


def windows_for(chosen: Recipe) -> Tensor | None:
    return None if chosen.is_data_free else WINDOWS


@each_kind
@pytest.mark.parametrize("name", EACH)
def test_every_expert_is_quantized_and_the_same_after_loading(
    folders: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    chosen = chosen_of(name)
    in_memory = pipeline.quantize(folders[kind], chosen, windows=windows_for(chosen)).model
    assert in_memory is not None
    left = {name for name, module in in_memory.named_modules() if isinstance(module, nn.Linear)}
    quantized = [module for module in in_memory.modules() if isinstance(module, QuantLinear)]
    assert left == {"lm_head"} and len(quantized) == 2 * (4 + 4 * 3)
    write(folders[kind], tmp_path / "out", chosen, windows=windows_for(chosen))
    assert torch.equal(logits(mxrot.load(tmp_path / "out", verify=True, device="cpu")), logits(in_memory))
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(by_transformers), logits(in_memory))


@each_kind
def test_tensors_are_called_as_in_checkpoints_of_the_family(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """An expert's linears by their own names; one transform for what all experts read, and one for each down."""
    write(folders[kind], tmp_path / "out", chosen_of("duquant++", smoothing="none"), windows=WINDOWS)
    gate, up, down = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}[kind]
    place = "model.layers.0.mlp.experts"
    found = {name: tuple(value.shape) for name, value in all_tensors(tmp_path / "out").items() if place in name}
    expected: dict[str, tuple[int, ...]] = {f"{place}.0.{gate}.layer0_gate_up_input.weight": (32, 32)}
    for number in range(4):
        for name, rows, inputs in ((gate, 96, 64), (up, 96, 64), (down, 64, 96)):
            expected[f"{place}.{number}.{name}.weight_packed"] = (rows, inputs // 2)
            expected[f"{place}.{number}.{name}.weight_scale"] = (rows, inputs // 32)
        expected[f"{place}.{number}.{down}.layer0_down_{number}_input.weight"] = (32, 32)
    assert found == expected


@each_kind
def test_a_fused_folder_gives_the_same_checkpoint(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    fused = write_tiny_mixture(tmp_path / "fused", kind, fused=True)
    for source, output in ((folders[kind], "one"), (fused, "two")):
        write(source, tmp_path / output, chosen_of("duquant++-gptq"), windows=WINDOWS)
    one, two = all_tensors(tmp_path / "one"), all_tensors(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@each_kind
@pytest.mark.parametrize("path", ["saved", "saved again", "quantized on load"])
def test_through_transformers(folders: dict[str, Path], tmp_path: Path, kind: str, path: str) -> None:
    """Whose own names of Mixtral's modules differ from those in files."""
    model = mxrot.quantize(folders[kind], "hadamard", device="cpu")
    expected = logits(model)
    if path == "quantized on load":
        options = {"quantization_config": mxrot.MxrotConfig("hadamard"), "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(folders[kind], **options)
        assert torch.equal(logits(model), expected)
    for turn in range(2 if path == "saved again" else 1):
        model.save_pretrained(tmp_path / str(turn))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(turn), dtype=torch.float32)
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(mxrot.load(tmp_path / str(turn), device="cpu")), expected)


def hessians_of(source: Path, chosen: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], Any]:
    """What rounding is given for each linear (the first of those that are rounded together), and the result."""
    given: dict[str, Tensor] = {}
    original = GPTQ.prepare

    def spy(self: GPTQ, hessian: Tensor, shifts: Any, name: str) -> Any:
        given[name] = hessian.clone()
        return original(self, hessian, shifts, name)

    monkeypatch.setattr(GPTQ, "prepare", spy)
    return given, pipeline.quantize(source, chosen, windows=WINDOWS)


@each_kind
def test_the_hessian_of_an_expert_is_of_the_tokens_sent_to_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of all tokens for the expert that gets none. Inputs as they are, seen again in the finished model."""
    plain = {"activations": "none", "transform__method": "identity", "rounding__target": "own"}
    given, result = hessians_of(folders[kind], chosen_of("mxrot", **plain), monkeypatch)
    family = find_family(read_config(folders[kind]), "here")
    assert family.experts is not None
    gate, _, down = family.experts.linears
    block = result.model.model.layers[0]
    read: list[tuple[Tensor, Tensor]] = []
    block.mlp.experts.register_forward_pre_hook(lambda _, arguments: read.append(arguments[:2]))
    with torch.no_grad():
        result.model(WINDOWS)
    (tokens, chosen), names = read[0], f"{family.block_prefix(0)}.mlp.experts"
    for number, expert in enumerate(block.mlp.experts):
        rows = tokens[(chosen == number).any(dim=-1)] if number < 3 else tokens
        assert len(rows) >= 96
        torch.testing.assert_close(
            given[f"{names}.{number}.{gate}"], rows.double().t() @ rows.double() / len(rows), rtol=1e-4, atol=1e-5
        )
        inner: list[Tensor] = []
        expert.get_submodule(down).register_forward_pre_hook(lambda _, arguments, seen=inner: seen.append(arguments[0]))
        with torch.no_grad():
            expert(rows)
        seen = inner[0].double()
        torch.testing.assert_close(given[f"{names}.{number}.{down}"], seen.t() @ seen / len(rows), rtol=1e-4, atol=1e-5)


@each_kind
def test_weights_of_all_experts_together_are_taken_in_pieces(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As those of a large model: a library may sum in another order then, so that a tie may fall the other way."""
    expected = pipeline.quantize(folders[kind], chosen_of("mxrot"), windows=WINDOWS).model
    monkeypatch.setattr(site_weights, "MOST_TOGETHER", 0)
    monkeypatch.setattr(moments, "MOST_TOGETHER", 1)
    found = pipeline.quantize(folders[kind], chosen_of("mxrot"), windows=WINDOWS).model
    assert expected is not None and found is not None
    pairs = [(value, found.state_dict()[name]) for name, value in expected.state_dict().items()]
    same = sum(int((one == other).sum()) for one, other in pairs)
    assert same > 0.999 * sum(one.numel() for one, _ in pairs)


@each_kind
def test_an_expert_with_few_tokens_is_on_record(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Few are fewer than the inputs of its widest linear, 96."""
    run = write(folders[kind], tmp_path / "out", chosen_of("duquant++-gptq"), windows=WINDOWS)
    assert run["blocks"][0]["few_tokens"]["model.layers.0.mlp.experts.3"] == 0
    assert all(count < 96 for block in run["blocks"] for count in block["few_tokens"].values())
    assert len(run["blocks"][0]["few_tokens"]) == 1
    short = write(folders[kind], tmp_path / "short", chosen_of("duquant++-gptq"), windows=WINDOWS[:2])
    assert len(short["blocks"][1]["few_tokens"]) == 4
    on_disk = json.loads((tmp_path / "short" / "run.json").read_text())["blocks"][1]
    assert on_disk["few_tokens"] == short["blocks"][1]["few_tokens"]
    assert {linear["site"] for linear in short["blocks"][0]["linears"]} == {"qkv", "o", "gate_up", "down"}
    plain = write(folders[kind], tmp_path / "plain", chosen_of("rtn"), windows=None)
    assert plain["blocks"][0]["few_tokens"] == {}


def test_gptq_beats_rounding_to_nearest_on_the_outputs_of_experts(folders: dict[str, Path], tmp_path: Path) -> None:
    """And loses on their weights."""
    errors = {}
    for rounding in ("rtn", "gptq"):
        chosen = chosen_of("duquant++", rounding__method=rounding, smoothing="none")
        run = write(folders["mixtral"], tmp_path / rounding, chosen, windows=WINDOWS)
        linears = [x for block in run["blocks"] for x in block["linears"] if x["site"] in ("gate_up", "down")]
        errors[rounding] = [sum(x[key] for x in linears) for key in ("weight_error", "output_error")]
    assert errors["gptq"][0] > errors["rtn"][0] and errors["gptq"][1] < errors["rtn"][1]


@pytest.mark.parametrize("name", ["duquant++", "mxrot"])
def test_a_run_that_was_interrupted_goes_on_with_the_same_bits(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    chosen, source = recipe(name), folders["mixtral"]
    write(source, tmp_path / "whole", chosen, windows=WINDOWS)

    def stop(done: int, total: int, what: str) -> None:
        if done == 1 and total == 2 and "order" not in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "out", chosen, windows=WINDOWS, progress=stop)
    quantized: list[int] = []
    original = pipeline.quantize_block
    monkeypatch.setattr(pipeline, "quantize_block", lambda *a: (quantized.append(a[1]), original(*a))[1])
    run = write(source, tmp_path / "out", chosen, windows=WINDOWS, resume=True)
    assert quantized == [1] and run["blocks"][0]["few_tokens"]
    assert without_run(digests(tmp_path / "out")) == without_run(digests(tmp_path / "whole"))


def test_an_expert_can_be_left_as_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    """The transform of gate and up then belongs to the first expert that is quantized."""
    patterns = ["*.experts.0.*", "model.layers.1.mlp.experts.*"]
    chosen = chosen_of("mxrot", ignore=patterns)
    run = write(folders["mixtral"], tmp_path / "out", chosen, windows=WINDOWS)
    names = {linear["name"] for block in run["blocks"] for linear in block["linears"]}
    assert len(names) == 2 * 4 + 3 * 3 and not [name for name in names if ".experts.0." in name]
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.experts.0.w1"), nn.Linear)
    assert "layer0_gate_up_input" in dict(loaded.get_submodule("model.layers.0.mlp.experts.1.w1").named_children())
    in_memory = pipeline.quantize(folders["mixtral"], chosen, windows=WINDOWS).model
    assert in_memory is not None and torch.equal(logits(loaded), logits(in_memory))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mxrot-tuned", {}, r"experts, as in family mixtral, are not tuned; set tuning = none"),
        ("duquant++", {"transform__sample": "mean"}, r'sample = "mean" is over windows, and experts'),
        (
            "duquant++",
            {"smoothing__skip": ["down_0"]},
            r"no site 'down_0'; did you mean 'down'\? its sites are down, qkv, o, ",
        ),
    ],
)
def test_what_is_not_done_with_experts_is_refused(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    """Before any weight is read."""
    monkeypatch.setattr(WeightFiles, "read_all", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(ConfigError, match=message):
        pipeline.quantize(folders["mixtral"], recipe(name, **changes), windows=WINDOWS)


def test_smoothing_can_leave_out_all_downs(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = (
        all_tensors(write_smoothed(folders["mixtral"], tmp_path / name, skip))
        for name, skip in (("one", ["o"]), ("two", ["o", "down"]))
    )
    same = [name for name in one if torch.equal(one[name], two[name])]
    downs = [name for name in one if name.endswith("w2.weight_packed")]
    assert downs and not set(downs) & set(same)
    assert "model.layers.0.mlp.gate.weight" in same


def write_smoothed(source: Path, output: Path, skip: list[str]) -> Path:
    write(source, output, recipe("smoothquant", smoothing__skip=skip), windows=WINDOWS)
    return output


def test_smoothing_goes_into_the_router_too(folders: dict[str, Path], tmp_path: Path) -> None:
    """The norm's gain times the router's weights stays what it was, up to the rounding of float16 (2^-11 each)."""
    write_smoothed(folders["qwen3_moe"], tmp_path / "out", [])
    after, before = all_tensors(tmp_path / "out"), all_tensors(folders["qwen3_moe"])
    names = ("model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.gate.weight")
    gains, routers = ([tensors[name].double() for tensors in (before, after)] for name in names)
    assert not torch.equal(gains[0], gains[1])
    torch.testing.assert_close(routers[1] * gains[1], routers[0] * gains[0], rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("name", ["rtn", "duquant++"])
def test_vllm_is_told_not_to(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    write(folders["qwen3_moe"], tmp_path / "out", chosen_of(name), windows=windows_for(chosen_of(name)))
    report = check_for_vllm(tmp_path / "out")
    assert "it has experts, which were not tried in vLLM" in report.stock.stops[0]
    assert "it has experts" in report.plugin.stops[0]


def test_what_is_prepared_for_kernels_computes_the_same(folders: dict[str, Path]) -> None:
    """gate and up of one expert become one product, those of two experts do not."""
    model = pipeline.quantize(folders["mixtral"], chosen_of("hadamard")).model
    assert model is not None
    expected = logits(model)
    prepare_linears(model)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert [len(experts[number].w1.site.linears) for number in range(4)] == [2] * 4
    assert experts[0].w1.whole_codes.shape == (192, 32)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_separating_keeps_what_is_there() -> None:
    """A model without experts is not touched."""
    model = nn.Sequential(nn.Linear(2, 2))
    before = list(model.modules())
    separate_experts(model)
    assert list(model.modules()) == before
