"""Models of architectures that nobody has written a family for: quantized, written, loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import random_windows, write_tiny_model, write_tokenizer
from typer.testing import CliRunner

import mxrot
from mxrot.checkpoint import is_checkpoint
from mxrot.cli import app
from mxrot.deriving import derived_family, record_text
from mxrot.errors import CheckpointError, ConfigError, FamilyError
from mxrot.models import Family, find_family, read_config
from mxrot.models.family_table import DERIVED, family_of_table, family_table

ARCHITECTURES = ("OlmoForCausalLM", "PersimmonForCausalLM")
"""With linears for q, k and v, and with one whose rows are these head after head."""
WINDOWS = random_windows(2, 32)


def write_unwritten(folder: Path, architecture: str) -> Path:
    config = config_of(Family("unwritten", (architecture,), ()), vocab_size=256, max_position_embeddings=512)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    model.half().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_unwritten(tmp_path / "model", request.param)


def test_it_is_refused_unless_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match="is of no known family"):
        mxrot.quantize(folder, "rtn", tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match=r"^family: unknown value 'llama'; known: auto$"):
        mxrot.quantize(folder, "rtn", tmp_path / "out", device="cpu", family="llama")
    assert not list(tmp_path.glob("out*"))


def test_what_is_loaded_is_what_was_quantized(folder: Path, tmp_path: Path) -> None:
    """By a recipe that writes text, permutes channels and smooths; nothing is asked for again."""
    options: dict[str, Any] = {"calib": WINDOWS, "device": "cpu", "family": "auto"}
    kept = mxrot.quantize(folder, "mxrot", **options)
    run = mxrot.quantize(folder, "mxrot", tmp_path / "out", **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    family = derived_family(read_config(folder), "here")
    assert run["family"] == config[DERIVED] == family_table(family)
    assert (tmp_path / "out.family.py").read_text() == record_text(family)
    expected = kept(WINDOWS).logits
    assert torch.isfinite(expected).all()
    kept.save_pretrained(tmp_path / "saved")
    for place in (tmp_path / "out", tmp_path / "saved"):
        assert is_checkpoint(place)
        assert torch.equal(mxrot.load(place, device="cpu")(WINDOWS).logits, expected)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        assert torch.equal(loaded(WINDOWS).logits, expected)


def test_a_run_goes_on_with_the_same_family_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mxrot.quantize(folder, "rtn", tmp_path / "out", device="cpu", family="auto")
    again = mxrot.quantize(folder, "rtn", tmp_path / "out", device="cpu", family="auto", resume=True)
    assert first["fingerprint"] == again["fingerprint"] and first["seconds"] == again["seconds"]
    monkeypatch.setattr("mxrot.deriving.derive._with_inner_rows", lambda _, family: family)
    monkeypatch.setattr("mxrot.deriving.derive._with_producer", lambda _, family, __: family)
    monkeypatch.setattr("mxrot.deriving.derive._with_values", lambda _, family, __: family)
    with pytest.raises(CheckpointError, match="was made by a run with another"):
        mxrot.quantize(folder, "rtn", tmp_path / "out", device="cpu", family="auto", resume=True)


def test_the_record_can_be_a_file_of_the_registry(folder: Path) -> None:
    found = derived_family(read_config(folder), "here")
    inside: dict[str, Any] = {}
    exec(record_text(found), inside)
    assert inside["FAMILY"] == found == family_of_table(family_table(found), "here")
    assert max(map(len, record_text(found).splitlines())) <= 120


def test_a_family_that_is_known_is_derived_where_that_is_asked_for(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    run = mxrot.quantize(model, "rtn", tmp_path / "out", device="cpu", family="auto")
    assert run["family"]["name"] == "llama"
    assert "family" not in mxrot.quantize(model, "rtn", tmp_path / "other", device="cpu")
    assert not find_family(read_config(tmp_path / "out"), "out").is_rotatable


@pytest.mark.parametrize("recipe", ["quarot", "spinquant"])
def test_what_was_not_looked_at_is_refused(folder: Path, tmp_path: Path, recipe: str) -> None:
    with pytest.raises(ConfigError, match=r"its record was derived|names no linear that makes them"):
        mxrot.quantize(folder, recipe, tmp_path / "out", calib=WINDOWS, device="cpu", family="auto")


def test_a_record_in_the_config_of_an_original_counts_for_nothing(folder: Path, tmp_path: Path) -> None:
    path = folder / "config.json"
    found = family_table(derived_family(read_config(folder), "here"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {DERIVED: found}))
    with pytest.raises(FamilyError, match="is of no known family"):
        mxrot.quantize(folder, "rtn", tmp_path / "out", device="cpu")
    with pytest.raises(FamilyError, match="is of no known family"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=mxrot.MxrotConfig("rtn"))


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    family = derived_family(read_config(folder), "here")
    shown = CliRunner().invoke(
        app, ["inspect", str(folder), "--family", "auto", "--json", str(tmp_path / "family.json")]
    )
    assert shown.exit_code == 0 and shown.stdout == record_text(family)
    assert json.loads((tmp_path / "family.json").read_text())["family"] == family_table(family)
    planned = CliRunner().invoke(app, ["plan", str(folder), "-r", "rtn", "--family", "auto", "--device", "cpu"])
    assert planned.exit_code == 0 and "nothing would be refused" in planned.stdout
    options = ["-r", "rtn", "-o", str(tmp_path / "out"), "--device", "cpu"]
    made = CliRunner().invoke(app, ["quantize", str(folder), *options, "--family", "auto"])
    assert made.exit_code == 0 and "sites derived by --family auto" in made.stdout
    measured = ["eval", str(tmp_path / "out"), "--windows", "1", "--seq-len", "32", "--device", "cpu"]
    assert CliRunner().invoke(app, measured).exit_code == 0
    assert CliRunner().invoke(app, [*measured, "--against", str(folder)]).exit_code == 2
    assert CliRunner().invoke(app, [*measured, "--against", str(folder), "--family", "auto"]).exit_code == 0
    for command in (["inspect"], ["plan"], ["quantize", *options]):
        refused = CliRunner().invoke(app, [command[0], str(folder), *command[1:], "--family", "other"])
        assert refused.exit_code == 2 and "unknown value 'other'" in refused.stderr


def tables() -> list[tuple[str, Any]]:
    """Tables that no `family_table` is, by what is said of them."""
    good = family_table(derived_family(config_of(Family("one", ("OlmoForCausalLM",), ())), "here"))
    sites = good["sites"]
    return [
        ("expected a table of", None),
        ("expected a table of", good | {"more": 1}),
        (r"\.blocks: expected the name of a module", good | {"blocks": "model layers"}),
        (r"\.head: expected the name of a module", good | {"head": None}),
        (r"\.rotary: expected the name of a module", good | {"rotary": 3}),
        (r"\.values: expected the name of a module", good | {"values": "../x"}),
        (r"\.windows: expected one of none, all, by kind", good | {"windows": "some"}),
        (r"\.architectures: expected a list of names", good | {"architectures": "OlmoForCausalLM"}),
        (r"\.sites: expected a list of sites", good | {"sites": []}),
        (r"\.sites: two sites have one name or one linear", good | {"sites": [*sites, sites[0]]}),
        (r"\.sites\.0\.name: expected lower-case", good | {"sites": [sites[0] | {"name": "Q"}]}),
        (r"\.sites\.0\.linears: expected a list", good | {"sites": [sites[0] | {"linears": []}]}),
        (r"\.sites\.0\.norm: expected the name", good | {"sites": [sites[0] | {"norm": 1}]}),
        (r"\.sites\.0\.norm_adds_one: expected true", good | {"sites": [sites[0] | {"norm_adds_one": 1}]}),
    ]


def test_a_table_that_is_none_is_refused() -> None:
    for message, table in tables():
        with pytest.raises(FamilyError, match=rf"^here: config.json: {DERIVED}.*{message}"):
            family_of_table(table, "here")
