"""What a report gathers, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny_model import write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import recipe

import mxrot
from mxrot.api import diverge
from mxrot.errors import CheckpointError, ConfigError, DataError
from mxrot.evaluation import ActivationView
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.report import Contents
from mxrot.report.measuring import Request, gather, read_records, sites_that_match, sites_that_stick_out
from mxrot.rules import Rules


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("reporting")
    model = write_tiny_model(root / "tiny")
    (root / "words.txt").write_text("".join(f"the number {n} follows {n - 1}; " for n in range(80)))
    options = {"calib": str(root / "words.txt"), "samples": 4, "seq_len": 32, "device": "cpu"}
    mxrot.quantize(model, recipe("duquant++"), root / "out", **options)
    return {"model": str(model), "text": str(root / "words.txt"), "checkpoint": str(root / "out")}


@pytest.fixture(scope="module")
def request_(folders: dict[str, str]) -> Request:
    return Request(folders["checkpoint"], folders["model"], [folders["text"]], windows=3, seq_len=32)


@pytest.fixture(scope="module")
def against(request_: Request) -> Contents:
    return gather(request_, "cpu")


def test_figures_are_those_of_diverge(against: Contents, folders: dict[str, str]) -> None:
    options = {"windows": 3, "seq_len": 32, "device": "cpu"}
    expected = diverge(folders["checkpoint"], folders["model"], folders["text"], **options)["words"]
    perplexity, kl, agreement = against.metrics
    assert (perplexity.value, perplexity.original) == (expected.ppl, expected.original_ppl)
    assert perplexity.difference_error == expected.ppl_error
    assert (kl.value, agreement.value) == (expected.kl, expected.agreement)


def test_before_is_the_original_or_else_the_input_without_the_transform(against: Contents, request_: Request) -> None:
    alone = gather(replace(request_, against=None), "cpu")
    assert against.before_is_original and not alone.before_is_original
    assert alone.after.keys() == against.after.keys() == against.before.keys()
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(alone.after[first].magnitudes, against.after[first].magnitudes)
    assert not torch.equal(alone.before[first].magnitudes, against.before[first].magnitudes), "smoothing is in norms"
    assert [metric.measure for metric in alone.metrics] == ["perplexity"] and alone.metrics[0].original is None
    assert alone.metrics[0].value == pytest.approx(against.metrics[0].value, rel=1e-9)


def test_results_are_shown_instead_of_measuring(request_: Request) -> None:
    score = {"ppl": 9.0, "nll": 2.2, "windows": 1, "tokens": 31, "seq_len": 32}
    results, baseline = {"perplexity": {"a": score}}, {"perplexity": {"a": {**score, "ppl": 7.0}}}
    shown = gather(replace(request_, against=None, results=results, baseline=baseline), "cpu")
    assert [(metric.value, metric.original) for metric in shown.metrics] == [(9.0, 7.0)]
    with pytest.raises(ConfigError, match="need those of the checkpoint"):
        gather(replace(request_, baseline=baseline))


def test_commands_on_record(against: Contents, folders: dict[str, str]) -> None:
    made, report = (command for _, command in against.commands)
    assert made == "mxrot quantize tiny --recipe recipe.toml --seed 0 --calib words --samples 4 --seq-len 32"
    assert report == (
        f"mxrot report {folders['checkpoint']} --against {folders['model']} --text {folders['text']} "
        "--windows 3 --seq-len 32"
    )


def view(crest: float) -> ActivationView:
    return ActivationView(
        torch.ones(1, 1), 32, torch.zeros(192, dtype=torch.int64), torch.ones(32), torch.ones(1), 1.0, 1.0, crest, None
    )


def rules(blocks: int, ignore: tuple[str, ...]) -> Rules:
    return Rules(recipe("rtn", ignore=ignore), LLAMA, blocks)


def test_sites_by_default_and_by_pattern() -> None:
    views = {
        "model.layers.0.self_attn.q_proj": view(3.0),
        "model.layers.0.mlp.down_proj": view(2.0),
        "model.layers.1.self_attn.q_proj": view(2.0),
        "model.layers.1.mlp.down_proj": view(4.0),
    }
    names = list(views)
    assert sites_that_stick_out(LLAMA, views) == [names[0], names[3]]
    ignore = ("o_proj",)
    assert sites_that_match(rules(2, ignore), ["1.mlp.down_proj", "*q_proj"]) == [names[0], names[2], names[3]]
    assert sites_that_match(rules(2, ignore), [names[1]]) == [names[1]]
    assert sites_that_match(rules(2, ignore), []) == []
    assert len(sites_that_match(rules(12, ignore), ["q_proj"])) == 12
    with pytest.raises(ConfigError, match="13 sites match q_proj; a page has room for 12"):
        sites_that_match(rules(13, ignore), ["q_proj"])
    for pattern in ("v_proj", "o_proj", "2.mlp.down_proj"):
        with pytest.raises(ConfigError, match=f"no site matches '{pattern}'; .* such as {names[0]}"):
            sites_that_match(rules(2, ignore), [pattern])


def test_what_is_no_checkpoint(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tiny: not a checkpoint written by mxrot"):
        read_records(Path(folders["model"]))
    copy = tmp_path / "copy"
    shutil.copytree(folders["checkpoint"], copy)
    run = json.loads((copy / "run.json").read_text())
    del run["size"]
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match=r"run\.json: has no 'size'"):
        read_records(copy)
    (copy / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json: not JSON"):
        read_records(copy)
    shutil.copy(Path(folders["checkpoint"]) / "run.json", copy)
    (copy / "recipe.toml").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_records(copy)


def test_a_report_of_experts(tmp_path: Path) -> None:
    """One picture for each kind of site; an expert without tokens cannot be asked for."""
    folder = write_tiny_mixture(tmp_path / "tiny", "mixtral")
    (tmp_path / "words.txt").write_text("".join(f"the number {n} follows {n - 1}; " for n in range(80)))
    mxrot.quantize(folder, recipe("hadamard"), tmp_path / "out", device="cpu")
    asked = Request(str(tmp_path / "out"), str(folder), [str(tmp_path / "words.txt")], windows=3, seq_len=32)
    contents = gather(asked, "cpu")
    assert [contents.site_of(name)[1] for name in contents.chosen] == ["qkv", "o", "gate_up", "down"]
    name = "model.layers.0.mlp.experts.3.w2"
    assert contents.site_of(name) == (0, "down")
    with pytest.raises(DataError, match=rf"^{name}: no token of the text is sent to this expert"):
        gather(replace(asked, sites=[name]), "cpu")
