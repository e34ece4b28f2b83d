"""A search on a tiny model: what is raised in memory is what quantizing would give, and what is written gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_model import random_windows, write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import recipe
from torch import Tensor

from mxrot import api
from mxrot.errors import ConfigError
from mxrot.evaluation import divergence
from mxrot.layers import build_apart
from mxrot.layers.cache_size import cache_of
from mxrot.models import FolderSource
from mxrot.overrides import Override
from mxrot.quantizing import block as quantizing_block
from mxrot.quantizing import quantize
from mxrot.quantizing import run as pipeline
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme
from mxrot.search import Choice, Found, job, search
from mxrot.search.bits import Cell, Costs, Limits, spelled
from mxrot.search.choices import base_choice, everywhere, with_overrides
from mxrot.search.found import BASE, QUANTIZED, SEARCHED
from mxrot.search.kept import KeptSearch
from mxrot.search.meter import Meter, Original
from mxrot.search.raised import RaisedModel
from mxrot.search.roundings import OtherRoundings

EIGHT, SIX = Choice("mxfp8_e4m3", "mxfp8_e4m3"), Choice("mxfp6_e2m3", "mxfp6_e2m3")
INPUTS = Choice("mxfp4", "mxfp8_e4m3")
CHOICES = (SIX, EIGHT, INPUTS)
WINDOWS, TOKENS = random_windows(6, 24), random_windows(4, 16, seed=1)
MXROT = recipe("mxrot", calibration__generated=0)
GPTQ = recipe("duquant++-gptq")
SMOOTHED = recipe("mxrot-vllm", calibration__generated=0)
TURNED = recipe("quarot")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two blocks, with a text."""
    folder = write_tiny_model(tmp_path_factory.mktemp("small") / "tiny")
    (folder / "words.txt").write_text("".join(f"the number {number} follows {number - 1}; " for number in range(140)))
    return folder


class Pass:
    """A finished pass over the tiny model."""

    def __init__(self, folder: Path, chosen: Recipe, place: Path) -> None:
        self.source, self.recipe = FolderSource(folder), chosen
        self.family, skeleton = self.source.family, build_apart(self.source.config)
        self.costs = Costs.of(chosen, CHOICES, self.family, skeleton, self.source.dtype)
        self.kept = KeptSearch(place, {"recipe": chosen.name}, resume=False)
        raises = {cell: list(choices) for cell, choices in self.costs.added.items()}
        self.windows = None if chosen.is_data_free else WINDOWS
        store = self.kept.store(self.family, 3)
        beside = OtherRoundings(raises, skeleton, self.kept)
        quantize(self.source, chosen, windows=self.windows, store=store, beside=beside)

    def model(self) -> RaisedModel:
        skeleton = build_apart(self.source.config)
        schemes = {one: Scheme.of(everywhere(self.recipe, one), self.family, skeleton) for one in CHOICES}
        own = Scheme.of(self.recipe, self.family, skeleton)
        return RaisedModel.load(self.source, self.recipe, schemes, own, self.kept, torch.device("cpu"))

    def quantized(self, *tables: Override) -> dict[str, Tensor]:
        """Tensors of the model as `quantize` makes it with these overrides."""
        model = quantize(self.source, with_overrides(self.recipe, tables), windows=self.windows).model
        assert model is not None
        return model.state_dict()


@pytest.fixture(scope="module", params=[MXROT, GPTQ, SMOOTHED, TURNED], ids=lambda chosen: chosen.name)
def done(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Pass:
    return Pass(source, request.param, tmp_path_factory.mktemp("work"))


def logits(raised: RaisedModel) -> Tensor:
    with torch.no_grad():
        return raised.model(TOKENS).logits


# What is raised


def test_nothing_raised_is_what_quantizing_gives(done: Pass) -> None:
    """Rounding in other ways beside changes no bit of it."""
    found, expected = done.model().model.state_dict(), done.quantized()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.spelled)
def test_a_site_that_is_raised_alone_is_what_quantizing_gives_for_it(done: Pass, choice: Choice) -> None:
    cell = Cell("o", 1)
    changes = tuple(sorted(choice.changes(base_choice(done.recipe))))
    expected = done.quantized(Override(changes, ("o",), (1, 1)))
    for name, tensor in load_file(done.kept._path(cell, choice)).items():
        assert torch.equal(tensor, expected[f"model.layers.1.{name}"]), name


def test_what_is_put_back_is_as_it_was(done: Pass) -> None:
    raised = done.model()
    before = logits(raised)
    raised.become({Cell("down", 0): EIGHT, Cell("qkv", 2): INPUTS})
    changed = logits(raised)
    raised.become({Cell("down", 0): SIX})
    raised.become({Cell("qkv", 2): INPUTS, Cell("down", 0): EIGHT})
    assert torch.equal(logits(raised), changed) and not torch.equal(changed, before)
    raised.become({})
    assert torch.equal(logits(raised), before)


def test_a_whole_model_raised_has_all_of_its_sites_from_that_choice(done: Pass) -> None:
    raised = done.model()
    raised.become(done.costs.all_of(EIGHT))
    scheme = Scheme.of(everywhere(done.recipe, EIGHT), done.family, build_apart(done.source.config))
    for name, one in scheme.linears.items():
        linear: Any = raised.model.get_submodule(name)
        assert (linear.weights, linear.activations) == (one.weights, one.activations)


# What is measured


def original_of(source: Path) -> Original:
    model, _ = api.open_model(source, "cpu")
    with torch.no_grad():
        states = [model.get_decoder()(input_ids=ids).last_hidden_state for ids in TOKENS.split(2)]
    return Original(model, TOKENS.split(2), states)


def test_a_measurement_is_the_divergence_whatever_was_measured_before(done: Pass, source: Path) -> None:
    """Passes that begin in the middle give the same."""
    raised, original = done.model(), original_of(source)
    meter = Meter(raised, original, "seen", done.kept, lambda *_: None, 5)
    late, early = {Cell("down", 2): EIGHT}, {Cell("qkv", 0): SIX, Cell("o", 1): INPUTS}
    meter.settle({})
    found = {spelled(mixture): meter.kl(mixture, "x") for mixture in (late, early, {})}
    meter.settle({**early})
    both = {**early, **late}
    found[spelled(both)] = meter.kl(both, "x")
    for mixture in (late, early, {}, both):
        raised.become(mixture)
        expected = divergence(raised.model, original.head, TOKENS, batch_windows=2).kl
        assert found[spelled(mixture)] == pytest.approx(expected, rel=1e-12), mixture


def test_blocks_before_the_first_change_do_not_run(done: Pass, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = done.model()
    meter = Meter(raised, original_of(source), "counted", done.kept, lambda *_: None, 5)
    meter.settle({})
    meter.kl({}, "x")
    ran: list[int] = []
    for index, block in enumerate(raised.blocks):
        attention = block.get_submodule("self_attn")
        attention.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    meter.kl({Cell("o", 2): EIGHT}, "x")
    assert ran == [2, 2]
    meter.kl({Cell("o", 1): EIGHT, Cell("o", 2): EIGHT}, "x")
    assert ran == [2, 2, 1, 2, 1, 2]
    meter.kl({Cell("o", 2): EIGHT}, "x")
    assert len(ran) == 6, "what is known was measured again"


def test_a_quantized_cache_is_measured_through(source: Path, tmp_path: Path) -> None:
    """Every block of every pass runs: its keys and values lie in the cache."""
    rows = {f"cache__{name}": "int4_row_asym" for name in ("keys", "values")}
    done = Pass(source, recipe("quarot-kv4", **rows), tmp_path)
    raised, original, mixture = done.model(), original_of(source), {Cell("o", 2): EIGHT}
    meter = Meter(raised, original, "seen", done.kept, lambda *_: None, 5)
    meter.settle({})
    found = meter.kl(mixture, "x")
    assert cache_of(raised.model) is not None
    assert found == pytest.approx(divergence(raised.model, original.head, TOKENS, batch_windows=2).kl, rel=1e-12)


# From the beginning to the recipe


def searched(source: Path, work: Path, chosen: Recipe = MXROT, bits: float = 5.0, **options: Any) -> Found:
    words = str(source / "words.txt")
    settings: dict[str, Any] = {"calib": words, "texts": words, "windows": 3, "seq_len": 24, "samples": 4}
    limits, choices = options.pop("limits", Limits(bits, None)), options.pop("choices", (SIX, EIGHT))
    settings |= {"device": "cpu", "work": work} | options
    return search(str(source), chosen, choices, limits, **settings)


def test_the_recipe_gives_the_mixture(small: Path, tmp_path: Path) -> None:
    """The figure of the search is that of quantizing by the file that was written, with nothing else said."""
    found = searched(small, tmp_path / "work")
    assert found.raised and found.rows[0].bits.weights == pytest.approx(4.25)
    (tmp_path / "mixture.toml").write_text(found.recipe_text)
    words = str(small / "words.txt")
    model = api.quantize(str(small), tmp_path / "mixture.toml", calib=words, device="cpu")
    read = api.read_texts(small, words, windows=6, seq_len=24)[0].ids
    rows = {row.label: row for row in found.rows}
    for ids, kl in ((read[:3], rows[QUANTIZED].seen), (read[3:], rows[QUANTIZED].unseen)):
        assert kl is not None
        again = divergence(model, api.open_model(small, "cpu")[0], ids, batch_windows=3)
        assert kl.mean == pytest.approx(again.kl, rel=1e-9) and kl.error == pytest.approx(again.kl_error, rel=1e-9)
    assert rows[QUANTIZED].seen.mean == pytest.approx(rows[SEARCHED].seen.mean, rel=0.5)
    assert rows[SEARCHED].seen.mean < 0.9 * rows[BASE].seen.mean and rows[SEARCHED].bits.weights <= 5.0
    assert found.recipe.name.startswith("mxrot-mixture-") and f"{rows[SEARCHED].bits.weights:.3f} bits a weight" in (
        found.recipe.summary
    )
    json.dumps(found.as_table())


def test_without_data_the_searched_figure_is_the_one_of_the_recipe(small: Path, tmp_path: Path) -> None:
    """Nothing is calibrated, so nothing that follows a raised site would be rounded otherwise."""
    found = searched(small, tmp_path / "work", recipe("hadamard"))
    rows = {row.label: row for row in found.rows}
    assert rows[SEARCHED].seen.mean == pytest.approx(rows[QUANTIZED].seen.mean, rel=1e-9)
    assert len(found.rows) == 5 and len(found.measured) > 10


def test_inputs_alone_leave_every_weight_in_its_format(small: Path, tmp_path: Path) -> None:
    found = searched(small, tmp_path / "work", recipe("hadamard"), choices=(INPUTS,), limits=Limits(None, 6.0))
    assert found.raised and [row.bits.weights for row in found.rows] == pytest.approx([4.25] * 4)
    mixture = next(row for row in found.rows if row.label == SEARCHED)
    assert 4.25 < mixture.bits.inputs <= 6.0
    assert {one.choice for one in found.raised} == {INPUTS}
    overrides = [dict(one.changes) for one in found.recipe.override]
    assert overrides and all(one == {"activations.format": "mxfp8_e4m3"} for one in overrides)


def test_the_best_uniform_choice_that_is_admitted_is_where_it_begins(small: Path, tmp_path: Path) -> None:
    found = searched(small, tmp_path / "work", recipe("hadamard"), bits=6.3)
    rows = {row.label: row for row in found.rows}
    assert rows[SEARCHED].seen.mean <= rows["all in mxfp6_e2m3"].seen.mean
    assert rows["all in mxfp8_e4m3"].bits.weights == pytest.approx(8.25)


class Stopped(BaseException):
    """As an interrupt."""


def stop_after(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, calls: int) -> list[int]:
    """Raise at that call of a function; what is counted."""
    counted: list[int] = [0]
    original = getattr(place, name)

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        counted[0] += 1
        if counted[0] == calls:
            raise Stopped
        return original(*arguments, **keywords)

    monkeypatch.setattr(place, name, stopping)
    return counted


ONE: dict[str, Any] = {"chosen": recipe("rtn", rounding__method="gptq"), "choices": (EIGHT,), "bits": 5.2}


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return searched(small, tmp_path_factory.mktemp("whole"), **ONE)


@pytest.mark.parametrize(
    ("place", "name", "calls"),
    [(pipeline, "quantize_block", 2), (quantizing_block, "quantize_site", 6), (Original, "kl", 7)],
)
def test_resume_goes_on_wherever_it_was_stopped(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Found, place: Any, name: str, calls: int
) -> None:
    """Between two blocks, within one, and between two measurements."""
    with monkeypatch.context() as context, pytest.raises(Stopped):
        stop_after(context, place, name, calls)
        searched(small, tmp_path, **ONE)
    again = searched(small, tmp_path, **ONE, resume=True)
    assert again.recipe == whole.recipe
    assert [row.seen for row in again.rows] == [row.seen for row in whole.rows]


def test_another_budget_takes_what_was_measured(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = searched(small, tmp_path, **ONE)
    told: list[str] = []
    blocks = stop_after(monkeypatch, pipeline, "quantize_block", 1000)
    second = searched(small, tmp_path, **ONE | {"bits": 4.6}, resume=True, announce=told.append)
    assert "measurements were made before" in told[0]
    assert blocks[0] == 2, "only what was found is quantized"
    assert second.rows[0] == first.rows[0]
    third = searched(small, tmp_path, **ONE | {"bits": 4.6}, resume=True)
    assert blocks[0] == 2 and third.rows == second.rows


def test_what_was_measured_is_forgotten_without_resume(tmp_path: Path) -> None:
    """And a line that was not written to its end is no measurement."""
    KeptSearch(tmp_path, {"a": 1}, resume=False).note("seen: ", [0.5, 0.25])
    kept = KeptSearch(tmp_path, {"a": 1}, resume=True)
    assert kept.measured == {"seen: ": [0.5, 0.25]}
    assert KeptSearch(tmp_path, {"a": 2}, resume=True).measured == {}
    with (kept.folder / "measured.jsonl").open("a") as file:
        file.write('\n{"what": "seen: o.1=')
    KeptSearch(tmp_path, {"a": 1}, resume=True).note("seen: o.2=x", [1.0])
    assert KeptSearch(tmp_path, {"a": 1}, resume=True).measured == {"seen: ": [0.5, 0.25], "seen: o.2=x": [1.0]}
    assert KeptSearch(tmp_path, {"a": 1}, resume=False).measured == {}


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chosen": recipe("mxrot-tuned")}, "recipe mxrot-tuned: search raises what is rounded once"),
        (
            {"chosen": recipe("mxrot-vllm", choice__candidates=["rounding.target=own"])},
            "recipe mxrot-vllm: search quantizes with one recipe",
        ),
        ({"bits": 4.2}, "--bits 4.2: recipe mxrot takes 4.250 with nothing raised; give more"),
        ({"limits": Limits(5.0, 4.0)}, "--input-bits 4: recipe mxrot takes 4.250 with nothing raised"),
        ({"limits": Limits(None, 4.0)}, "--bits 4: recipe mxrot takes 4.250 with nothing raised"),
        ({"chosen": recipe("mxfp8"), "choices": (SIX,), "bits": 9.0}, "mxfp8: none of the choices takes more bits"),
        ({"choices": (EIGHT, Choice("nvfp4", "nvfp4"))}, "--choices nvfp4: rounding gptq: the scale rule 'absmax'"),
    ],
)
def test_refused_before_any_weight_is_read(
    small: Path, tmp_path: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "quantizing", None)
    with pytest.raises(ConfigError) as caught:
        searched(small, tmp_path / "work", **changes)
    assert said in str(caught.value)


def test_experts_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_mixture(tmp_path / "mixture", "mixtral")
    with pytest.raises(ConfigError, match="search does not raise experts, as in family mixtral"):
        search(str(folder), MXROT, (EIGHT,), Limits(5.0), work=tmp_path / "work", device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(small: Path, tmp_path: Path) -> None:
    """Sites that are raised are prepared for its kernels; put back, and quantized again, it is the same model."""
    found = searched(small, tmp_path / "work", recipe("hadamard"), device="cuda")
    rows = {row.label: row for row in found.rows}
    assert found.raised and rows[SEARCHED].seen.mean < rows[BASE].seen.mean
    assert rows[SEARCHED].seen.mean == pytest.approx(rows[QUANTIZED].seen.mean, rel=1e-3)
    again = searched(small, tmp_path / "work", recipe("hadamard"), device="cuda", resume=True)
    assert again.rows == found.rows
