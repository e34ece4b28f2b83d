"""What a pass over the decoder blocks does, block by block and site by site."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import WINDOWS, logits, recipe, windows_for, write
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mxrot.calibration import Executor, Hessian, World, placement
from mxrot.calibration.placement import Placement
from mxrot.errors import ConfigError, FamilyError, MxrotError, NumericsError
from mxrot.layers import QuantLinear, build_apart
from mxrot.models import FAMILIES, Site, WeightFiles
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.quantizing import batches
from mxrot.quantizing import run as pipeline
from mxrot.quantizing.record import BlockReport
from mxrot.quantizing.run import quantize
from mxrot.recipe import Recipe
from mxrot.rounding import linalg

GPTQ = recipe("duquant++-gptq")
PLAIN_GPTQ = recipe("rtn", rounding__method="gptq")
CALIBRATED = [recipe("smoothquant"), recipe("duquant++"), recipe("duquant++", transform__sharing="block"), GPTQ]
LINEARS = [linear for site in LLAMA.sites for linear in site.linears]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors in the order in which they are read."""
    names: list[str] = []
    original = WeightFiles.read_all

    def read_all(self: WeightFiles, some: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        names.extend(some)
        return original(self, some, device)

    monkeypatch.setattr(WeightFiles, "read_all", read_all)
    return names


def model_of(source: Path, chosen: Recipe, windows: Tensor | None = None, **options: Any) -> PreTrainedModel:
    windows = windows_for(chosen) if windows is None else windows
    model = quantize(source, chosen, windows=windows, **options).model
    assert model is not None
    return model


def original_of(source: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)


@contextmanager
def inputs_seen(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """While open, the latest input of each named module."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: seen.update({name: arguments[0].clone()})

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Memory:
    """A store that keeps tensors, and looks at the model when it is given a block."""

    model: list[PreTrainedModel] = field(default_factory=list)
    blocks: dict[int, tuple[dict[str, Tensor], BlockReport]] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    full_blocks: list[list[int]] = field(default_factory=list)

    def load(self, index: int) -> tuple[dict[str, Tensor], BlockReport] | None:
        return self.blocks.get(index)

    def save(self, index: int, tensors: dict[str, Tensor], report: BlockReport) -> None:
        self.full_blocks.append(full_blocks(self.model[0]))
        self.blocks[index] = tensors, report

    def save_rest(self, tensors: dict[str, Tensor]) -> None:
        self.rest = tensors


def full_blocks(model: PreTrainedModel) -> list[int]:
    """Decoder blocks with a parameter that is really there."""
    blocks = model.get_submodule(LLAMA.blocks).children()
    return [index for index, block in enumerate(blocks) if any(not p.is_meta for p in block.parameters())]


def test_scores_that_attention_writes_out_bound_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads: 192 scores a token of a window of 48, and 96 channels in the widest linear."""
    monkeypatch.setattr(batches, "BATCH_ELEMENTS", 48 * 192 * 3)
    for name, windows in (("gemma2", 3), ("gemma3", 6)):
        model = build_apart(config_of(FAMILIES[name]))
        assert batches.windows_at_once(model, torch.device("cpu"), 48) == windows


# --- the order of things


@pytest.mark.parametrize("chosen", CALIBRATED, ids=lambda chosen: f"{chosen.name}-{chosen.sharing}")
def test_a_block_sees_the_outputs_of_quantized_blocks(
    source: Path, monkeypatch: pytest.MonkeyPatch, chosen: Recipe
) -> None:
    seen: dict[int, Tensor] = {}
    original = pipeline.quantize_block

    def spy(run: Any, index: int, block: nn.Module, executor: Executor, *more: Any) -> BlockReport:
        seen[index] = executor.stacked(range(executor.windows))
        return original(run, index, block, executor, *more)

    monkeypatch.setattr(pipeline, "quantize_block", spy)
    model = model_of(source, chosen)
    with torch.no_grad():
        quantized = model(WINDOWS, output_hidden_states=True).hidden_states
        full = original_of(source)(WINDOWS, output_hidden_states=True).hidden_states
    assert torch.equal(seen[0], full[0])
    assert torch.equal(seen[1], quantized[1])
    assert not torch.allclose(seen[1], full[1], rtol=1e-3)


@pytest.mark.parametrize("chosen", [GPTQ, PLAIN_GPTQ], ids=lambda chosen: chosen.name)
def test_the_hessian_is_that_of_what_each_linear_really_sees(
    source: Path, monkeypatch: pytest.MonkeyPatch, chosen: Recipe
) -> None:
    """Inputs from the quantized linears before it in the same block too, transformed and quantized."""
    hessians: list[Tensor] = []
    original = Hessian.result

    def result(self: Hessian, world: World) -> Tensor:
        found = original(self, world)
        hessians.append(found.clone())  # rounding overwrites it
        return found

    monkeypatch.setattr(Hessian, "result", result)
    model = model_of(source, chosen)
    firsts = [f"model.layers.{index}.{site.linears[0]}" for index in (0, 1) for site in LLAMA.sites]
    assert len(hessians) == len(firsts)
    with torch.no_grad(), inputs_seen(model, firsts) as seen:
        model(WINDOWS)
    for name, hessian in zip(firsts, hessians, strict=True):
        linear = model.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        x = linear.quantized_input(seen[name]).flatten(0, -2)
        assert not torch.equal(x, seen[name].flatten(0, -2))
        assert torch.equal(hessian, (x.t() @ x).double() / len(x))


def test_sites_are_taken_in_order(source: Path) -> None:
    record = quantize(source, GPTQ, windows=WINDOWS).record
    for index, block in enumerate(record.blocks):
        assert block.index == index and block.seconds >= 0
        assert [linear.name for linear in block.linears] == [f"model.layers.{index}.{name}" for name in LINEARS]
        assert [linear.site for linear in block.linears] == [site.name for site in LLAMA.sites for _ in site.linears]


def test_progress(source: Path) -> None:
    """Between two blocks each site tells of its steps; none tells that the block is done, which is not kept yet."""
    told: list[tuple[float, int, str]] = []
    quantize(source, recipe("rtn"), progress=lambda *news: told.append(news))
    blocks = [(0, 2, "model.layers.0"), (1, 2, "model.layers.1"), (2, 2, "done")]
    assert [each for each in told if each in blocks] == blocks
    assert [each[0] for each in told] == sorted(each[0] for each in told)
    within = [each for each in told if 0 < each[0] < 1]
    assert {each[2] for each in within} == {f"model.layers.0.{site.linears[0]}" for site in LLAMA.sites}
    last = LLAMA.sites[-1].linears[0], 64 * 96, 4 * 64 * 64 + 3 * 64 * 96 - 2 * 32 * 64
    assert within[-1] == (pytest.approx(1 - last[1] / last[2] * 4 / 5), 2, f"model.layers.0.{last[0]}")


def test_windows_in_several_batches_are_all_seen(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", {"cpu": 48})
    counts: list[int] = []
    original = Hessian.result
    monkeypatch.setattr(Hessian, "result", lambda self, world: (counts.append(self.count), original(self, world))[1])
    model_of(source, PLAIN_GPTQ)
    assert counts == [WINDOWS.numel()] * 8


@pytest.mark.parametrize("where", ["host memory", "disk"])
@pytest.mark.parametrize("name", ["duquant++-gptq", "mxrot", "mxrot-tuned"])
def test_states_that_wait_elsewhere_are_the_same(
    source: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    """On a CPU a copy; each is looked up where it was put."""
    monkeypatch.setattr(batches, "BATCH_TOKENS", {"cpu": 48})
    changes: dict[str, Any] = {"calibration__generated": 0.0} if "mxrot" in name else {}
    if name == "mxrot-tuned":
        changes |= {"tuning__scope": "block", "tuning__generated": 0.0, "tuning__steps": 3}
    chosen = recipe(name, **changes)
    expected = model_of(source, chosen, WINDOWS).state_dict()
    puts: list[torch.device] = []
    put = Placement.put

    def count(place: Placement, value: object) -> object:
        assert place.is_on_host and (place.folder is not None) == (where == "disk")
        puts.append(place.device)
        return put(place, value)

    monkeypatch.setattr(placement, "MOST_ON_DEVICE", {"cpu": 0})
    monkeypatch.setattr(placement, "on_disk", lambda *_: where == "disk")
    monkeypatch.setattr(Placement, "put", count)
    found = model_of(source, chosen, WINDOWS).state_dict()
    assert len(puts) > 8 and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_last_block_is_not_run_for_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advanced: list[str] = []
    original = Executor.advance
    monkeypatch.setattr(Executor, "advance", lambda self, name: (advanced.append(name), original(self, name))[1])
    model_of(source, recipe("smoothquant"))
    assert advanced == ["model.layers.0"]


@pytest.mark.parametrize("name", ["rtn", "hadamard"])
def test_a_recipe_without_data_runs_nothing_forward(source: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def forward(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a forward pass")

    for kind in (LlamaDecoderLayer, LlamaForCausalLM, nn.Linear, nn.Embedding, QuantLinear):
        monkeypatch.setattr(kind, "forward", forward)
    record = quantize(source, recipe(name)).record
    assert record.windows is None
    assert all(x.output_error is None and x.damping is None for block in record.blocks for x in block.linears)


# --- what is recorded


def test_errors_are_those_of_the_linears(source: Path) -> None:
    """Block 0, which sees the same inputs in both models. No smoothing, so that weights are those of the file."""
    chosen = replace(recipe("duquant++"), smoothing=None)
    result = quantize(source, chosen, windows=WINDOWS)
    assert result.model is not None
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    (report,) = (x for x in result.record.blocks[0].linears if x.name == name)
    linear = result.model.get_submodule(name)
    assert isinstance(linear, QuantLinear) and linear.transform is not None
    with torch.no_grad(), inputs_seen(result.model, [name]) as seen:
        result.model(WINDOWS)
        found = linear(seen[name]).double()
    weight = tensors[f"{name}.weight"].double()
    expected = seen[name].double() @ weight.t()
    # Sums in float32 over 64 channels, against an error of some per cent.
    assert report.output_error == pytest.approx(((found - expected).norm() / expected.norm()).item(), rel=1e-4)
    assert 0.02 < report.output_error < 0.4
    assert report.shape == (32, 64) and report.site == "qkv"
    # The rotation is nearly orthogonal: undone, the error of the weights has the same norm, up to bfloat16.
    matrix = linear.transform(torch.eye(64)).double()
    folded = weight @ torch.linalg.inv(matrix).t()
    error = (linear.dequantized_weight().double() - folded).norm() / folded.norm()
    assert report.weight_error == pytest.approx(error.item(), rel=1e-9)


def test_damping_is_recorded_where_there_is_a_hessian(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen, asked in ((recipe("duquant++"), None), (PLAIN_GPTQ, PLAIN_GPTQ.rounding.damping)):
        record = quantize(source, chosen, windows=WINDOWS).record
        assert {x.damping for block in record.blocks for x in block.linears} == {asked}
    # One more failed attempt, ten times the damping.
    original, calls = torch.linalg.cholesky_ex, [0]

    def failing_first(matrix: Tensor, out: tuple[Tensor, Tensor]) -> Any:
        calls[0] += 1
        return (matrix, out[1].fill_(1)) if calls[0] % 2 else original(matrix, out=out)

    monkeypatch.setattr(linalg.torch.linalg, "cholesky_ex", failing_first)
    record = quantize(source, PLAIN_GPTQ, windows=WINDOWS).record
    assert {x.damping for block in record.blocks for x in block.linears} == {PLAIN_GPTQ.rounding.damping * 10}


def test_the_record(source: Path) -> None:
    record = quantize(source, GPTQ, windows=WINDOWS, seed=4).record
    assert (record.seed, record.windows, record.device, record.peak_gpu_bytes) == (4, (6, 24), "cpu", None)
    assert record.seconds >= sum(block.seconds for block in record.blocks) - 0.01
    assert {"mxrot", "torch", "transformers", "python"} <= record.versions.keys()
    table = record.as_table()
    assert Recipe.from_toml(table["recipe"], "record") == GPTQ
    assert table["blocks"][1]["linears"][0]["name"] == "model.layers.1.self_attn.q_proj"


# --- the function of the model


@pytest.mark.parametrize(
    "chosen", [recipe("rtn"), recipe("hadamard"), *CALIBRATED], ids=lambda x: f"{x.name}-{x.sharing}"
)
@pytest.mark.parametrize("biases", [False, True])
def test_the_model_computes_the_same_up_to_rounding(tmp_path: Path, biases: bool, chosen: Recipe) -> None:
    """In eight bits: E4M3 has a step of 1/8, so relative errors of some per cent; a wrong fold gives about one.

    The biases are large, no error of the weights touches them, and they make up most of the output.
    """
    source = write_tiny_model(tmp_path / "source", attention_bias=biases, mlp_bias=biases)
    changes = {"weights.format": "mxfp8_e4m3", "activations.format": "mxfp8_e4m3"}
    if chosen.rounding.requirements.hessian:
        changes["rounding.scales"] = "fixed"
    model, original = model_of(source, chosen.changed(changes)), original_of(source)
    expected = logits(original)
    in_eight_bits = (logits(model) - expected).norm() / expected.norm()
    in_four_bits = (logits(model_of(source, chosen)) - expected).norm() / expected.norm()
    assert in_eight_bits < (0.008 if biases else 0.08)
    assert 2 * in_eight_bits < in_four_bits < 8 * in_eight_bits


def test_a_seed_decides_about_what_is_drawn(source: Path) -> None:
    chosen = recipe("duquant++")
    same = [logits(model_of(source, chosen, seed=1)) for _ in range(2)]
    assert torch.equal(*same) and not torch.equal(same[0], logits(model_of(source, chosen, seed=2)))


# --- one block at a time


@pytest.mark.parametrize("chosen", [recipe("rtn"), GPTQ], ids=lambda chosen: chosen.name)
def test_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str], chosen: Recipe) -> None:
    source = write_tiny_model(tmp_path / "source", num_hidden_layers=3)
    store = Memory()
    original = pipeline.build_apart
    monkeypatch.setattr(
        pipeline, "build_apart", lambda config: (store.model.append(original(config)), store.model[0])[1]
    )

    def progress(done: float, total: int, what: str) -> None:
        if what.count(".") > 2:
            return  # within a block
        assert full_blocks(store.model[0]) == []
        read = {name.split(".")[2] for name in reads if name.startswith("model.layers.")}
        assert read == {str(index) for index in range(int(done))}

    result = quantize(source, chosen, windows=windows_for(chosen), store=store, progress=progress)
    assert result.model is None
    assert store.full_blocks == [[0], [1], [2]]
    assert store.rest.keys() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    blocks = [name for name in reads if name.startswith("model.layers.")]
    assert len(blocks) == len(set(blocks)) == 3 * 9


@pytest.mark.parametrize("chosen", [recipe("rtn"), recipe("duquant++"), GPTQ], ids=lambda chosen: chosen.name)
def test_a_block_that_the_store_holds_is_not_read_again(
    source: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str], chosen: Recipe
) -> None:
    def run(store: Memory) -> None:
        quantize(source, chosen, windows=windows_for(chosen), store=store)

    original = pipeline.build_apart
    first = Memory()
    monkeypatch.setattr(
        pipeline, "build_apart", lambda config: (first.model.append(original(config)), first.model[-1])[1]
    )
    run(first)
    again = Memory(model=first.model, blocks={0: first.blocks[0]})
    reads.clear()
    run(again)
    assert not any(name.startswith("model.layers.0.") for name in reads)
    for name, value in first.blocks[1][0].items():
        assert torch.equal(value, again.blocks[1][0][name])


# --- what cannot work


def test_nothing_is_read_before_the_recipe_is_known_to_fit(tmp_path: Path, source: Path, reads: list[str]) -> None:
    odd = write_tiny_model(tmp_path / "odd", intermediate_size=100)
    smooth = recipe("smoothquant")
    cases: list[tuple[Path, Recipe, type[MxrotError], str]] = [
        (odd, recipe("rtn"), ConfigError, "down_proj: in_features 100 is not a multiple of the block size 32; list it"),
        (source, recipe("duquant++"), ConfigError, r"recipe duquant\+\+ needs calibration text"),
        (
            source,
            smooth.changed({"smoothing.skip": ["o", "out"]}),
            ConfigError,
            "recipe smoothquant: smoothing.skip: family llama has no site 'out'; its sites are qkv, o, gate_up, down",
        ),
        (tmp_path, recipe("rtn"), FamilyError, "no config.json"),
    ]
    for folder, chosen, kind, message in cases:
        with pytest.raises(kind, match=message):
            quantize(folder, chosen)
    assert reads == []


def test_an_odd_linear_can_be_ignored(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "odd", intermediate_size=100)
    model = model_of(source, recipe("smoothquant", ignore=["down_proj"]))
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear)
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear


def test_smoothing_needs_a_place_to_go(source: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    """Of a family with a site that nothing can be folded before."""
    sites = tuple(Site(site.name, site.linears) if site.name == "o" else site for site in LLAMA.sites)
    monkeypatch.setattr("mxrot.models.source.find_family", lambda config, where: replace(LLAMA, sites=sites))
    with pytest.raises(ConfigError, match=r"site 'o' of family llama .* smoothing\.skip, or set transform\.sharing = "):
        quantize(source, recipe("smoothquant"), windows=WINDOWS)
    assert reads == []
    quantize(source, recipe("smoothquant", smoothing__skip=["o"]), windows=WINDOWS)
    quantize(source, recipe("smoothquant", ignore=["o_proj"]), windows=WINDOWS)
    quantize(source, recipe("smoothquant", transform__sharing="block"), windows=WINDOWS)


def test_what_is_quantized_already(tmp_path: Path, source: Path) -> None:
    write(source, tmp_path / "out", recipe("rtn"))
    with pytest.raises(FamilyError, match=r"out: is quantized already \(quantization_config in config.json\)"):
        quantize(tmp_path / "out", recipe("rtn"))


def changed_model(target: Path, change: Callable[[dict[str, Tensor]], object], **settings: Any) -> Path:
    folder = write_tiny_model(target, **settings)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_damaged_weight_is_named(tmp_path: Path, bad: float) -> None:
    source = changed_model(tmp_path / "bad", lambda tensors: tensors[UP][3].fill_(bad))
    with pytest.raises(
        NumericsError, match=f"{UP}: the weights hold NaN or Inf; the file model.safetensors is damaged"
    ):
        quantize(source, recipe("rtn"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(UP), r"tensors .* expected model.layers.1.mlp.up_proj.weight \[96, 64\], got no"),
        (
            lambda tensors: tensors.update({UP: torch.ones(96, 32)}),
            r"expected .*1.mlp.up_proj.weight \[96, 64\], got .*32\]",
        ),
        (
            lambda tensors: tensors.update({f"{UP}s": torch.ones(1)}),
            r"mlp.up_proj.weights: .* no place for this tensor",
        ),
        (lambda tensors: tensors.pop("model.norm.weight"), r"expected model.norm.weight \[64\], got no model.norm"),
        (lambda tensors: tensors.pop("lm_head.weight"), r"expected lm_head.weight \[256, 64\], got no lm_head"),
        (lambda tensors: tensors.update({"mtp.weight": torch.ones(1)}), "mtp.weight: .* has no place for this tensor"),
    ],
    ids=["missing", "shape", "extra", "missing norm", "missing head", "extra outside"],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    with pytest.raises(FamilyError, match=message):
        quantize(changed_model(tmp_path / "bad", change), recipe("rtn"))


@pytest.mark.filterwarnings("ignore:.*scales of its inputs go from:mxrot.errors.MxrotWarning")  # as they are to
@pytest.mark.parametrize("chosen", [*CALIBRATED, PLAIN_GPTQ], ids=lambda chosen: f"{chosen.name}-{chosen.sharing}")
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"input_layernorm": 3e38}, "model.layers.0.self_attn.q_proj: its input"),
        ({"self_attn.v_proj": 1e6, "self_attn.o_proj": 5e37}, "model.layers.0.mlp.gate_proj: its input"),
        ({"mlp.gate_proj": 1e20, "mlp.up_proj": 1e20}, "model.layers.0.mlp.down_proj: its input"),
        ({"mlp.up_proj": 1e6, "mlp.down_proj": 5e37}, "model.layers.0: its output"),
    ],
    ids=["qkv", "gate_up", "down", "block"],
)
def test_overflowing_activations_name_the_layer(
    tmp_path: Path, chosen: Recipe, weights: dict[str, float], message: str
) -> None:
    """Weights of a float32 model that are finite themselves, but not what is computed with them."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            tensors[f"model.layers.0.{name}.weight"].fill_(value)

    source = changed_model(tmp_path / "huge", change, dtype=torch.float32)
    with pytest.raises(NumericsError, match=f"^{message} holds NaN or Inf on the calibration text$"):
        quantize(source, chosen, windows=WINDOWS)


def test_a_hessian_that_cannot_be_factorized_names_the_layer(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Hessian.result
    for damage, message in (
        (lambda matrix: matrix - 1e4 * torch.eye(64), "cannot be factorized even with damping"),
        (lambda matrix: matrix * torch.nan, "holds NaN or Inf"),
    ):
        calls: list[int] = []

        def result(self: Hessian, world: World, damage: Any = damage, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return damage(original(self, world)) if len(calls) == 6 else original(self, world)

        monkeypatch.setattr(Hessian, "result", result)
        with pytest.raises(NumericsError, match=rf"^model\.layers\.1\.self_attn\.o_proj: the Hessian .*{message}"):
            quantize(source, PLAIN_GPTQ, windows=WINDOWS)


def test_one_window_of_two_tokens_is_enough(source: Path) -> None:
    logits(model_of(source, GPTQ, random_windows(1, 2)))
