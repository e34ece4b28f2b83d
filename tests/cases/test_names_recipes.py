"""Names that match nothing: in recipes, in `--set`, in Python."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tests.cases.commands import mxrot, refused
from tests.tiny_model import write_tiny_mixture, write_tiny_model

from mxrot.errors import ConfigError
from mxrot.recipe import Recipe, load_recipe
from mxrot.rounding.gptq import GPTQ
from mxrot.sections import CalibrationChoice, QuantizerChoice, Smoothing, Tuning
from mxrot.transforms.outlier import OutlierRotation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("names") / "model")


def refused_pattern(model: Path, output: Path, pattern: str) -> str:
    """What quantizing and planning say of a pattern; both the same, and no weight is read for it."""
    words = ("--recipe", "rtn", "--set", f"ignore={json.dumps([pattern])}")
    said = refused("quantize", model, "-o", output, *words, "--device", "cpu")
    assert not output.exists()
    planned = mxrot("plan", model, *words, "--device", "cpu")
    assert planned.exit_code == 1 and f"refused: {said}" in planned.stdout, planned.output
    return said


@pytest.mark.case("D1")
@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("dwon_proj", "'down_proj'"),
        ("Down_Proj", "'down_proj'"),
        ("model.layers.7.mlp.up_proj", "'model.layers.1.mlp.up_proj'"),
        # modules that hold linears, ends of names, tensors
        ("self_attn", '"*self_attn*"'),
        ("mlp", '"*mlp*"'),
        ("model.layers.0", '"model.layers.0.*"'),
        ("mlp.down_proj", '"*.mlp.down_proj"'),
        ("down_proj.weight", '"down_proj"'),
        # what other tools read
        ("re:.*down_proj", '"*down_proj"'),
        ("re:.*self_attn.*", '"*self_attn*"'),
        (r"re:model\.layers\.\d+\.mlp\..*", '"model.layers.*.mlp.*"'),
        ("re:.*(q_proj|k_proj)$", '"*q_proj", "*k_proj"'),
        (".*down_proj", '"*down_proj"'),
        # what is no linear, and nothing at all
        ("embed_tokens", "take it out"),
        ("*norm*", "take it out"),
        ("", "q_proj"),
        ("*.experts.*", "q_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(model: Path, tmp_path: Path, pattern: str, meant: str) -> None:
    said = refused_pattern(model, tmp_path / "out", pattern)
    assert "matches no linear" in said and meant in said and "shell-style" in said
    assert ("regular expression" in said) == pattern.startswith(("re:", "."))


@pytest.mark.case("D1")
def test_one_pattern_of_several_that_matches_nothing_is_enough(model: Path, tmp_path: Path) -> None:
    words = ("--recipe", "rtn", "--set", 'ignore=["down_proj", "lm_head", "gate"]', "--device", "cpu")
    assert "ignore: 'gate' matches" in refused("quantize", model, "-o", tmp_path / "out", *words)


@pytest.mark.case("D1")
def test_the_experts_of_a_mixture_are_linears(tmp_path: Path) -> None:
    folder = write_tiny_mixture(tmp_path / "moe", "qwen3_moe", fused=True)
    said = refused_pattern(folder, tmp_path / "out", "experts.1")
    assert '"*.experts.1.*"' in said


@pytest.mark.case("D1")
def test_patterns_of_any_length_are_said_in_short(model: Path, tmp_path: Path) -> None:
    assert len(refused_pattern(model, tmp_path / "out", "x" * 3000)) < 600


@pytest.mark.case("D1")
def test_a_recipe_that_leaves_everything_as_it_is_is_refused(model: Path, tmp_path: Path) -> None:
    for patterns in ('["*"]', '["*_proj"]', '["*self_attn*", "*mlp*"]'):
        words = ("--recipe", "rtn", "--set", f"ignore={patterns}", "--device", "cpu")
        assert "nothing would be quantized" in refused("quantize", model, "-o", tmp_path / "out", *words)


@pytest.mark.case("D1")
def test_names_of_sites_recipes_and_methods(model: Path, tmp_path: Path) -> None:
    base = ("quantize", model, "-o", tmp_path / "out", "--device", "cpu", "--recipe")
    assert "did you mean 'down'" in refused(*base, "duquant++", "--set", 'smoothing.skip=["down_proj"]')
    assert "did you mean 'duquant++'" in refused(*base, "duqant++")
    assert "did you mean 'hadamard'" in refused(*base, "rtn", "--set", "transform.method=hadmard")
    assert "did you mean 'gptq'" in refused(*base, "rtn", "--set", "rounding.method=gtpq")
    assert "did you mean 'mxfp4'" in refused(*base, "rtn", "--set", "weights.format=mxpf4")
    assert "did you mean 'floor'" in refused(*base, "rtn", "--set", "weights.rule=flor")
    assert "did you mean 'mxrot'" in refused("recipes", "mxrto")


SECTION = {"transform.sharng": ["sharing", "method", "damping", "condition"], "rounding.dampin": ["damping", "method"]}


@pytest.mark.case("D2")
@pytest.mark.parametrize(("key", "known"), SECTION.items())
def test_an_unknown_key_is_told_all_valid_ones_the_nearest_first(key: str, known: list[str]) -> None:
    said = refused("plan", "demo", "--set", f"{key}=block")
    listed = said.partition("known: ")[2].split(", ")
    assert listed[0] == known[0] and set(known) <= set(listed)
    assert f"did you mean '{known[0]}'" in said


@pytest.mark.case("D2")
@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ("sharing=block", "'transform.sharing'"),
        ("sharng=block", "'transform.sharing'"),
        ("samples=8", "'calibration.samples'"),
        ("transfrom.sharing=block", "'transform'"),
        ("ingore=[]", "'ignore'"),
        ("transform.method=hadmard", "'hadamard'"),
        ("smoothing.alpa=0.5", "'alpha'"),
        ("tuning.step=5", "'steps'"),
        ("transform=hadamard", "transform.method"),
        ("weights=mxfp4", "weights.format"),
        # a value of another type says which was expected
        ("calibration.samples=many", "expected int"),
        ("calibration.samples=1.5", "expected int"),
        ("calibration.generated=much", "expected float"),
        ("ignore=down_proj", 'such as ["down_proj"]'),
        ("ignore=[down_proj, up_proj]", 'such as ["down_proj", "up_proj"]'),
        ("transform.sharing=blok", "block, site"),
        ("transform.steps=3", "'dual' and 'outlier' have"),
        ("calibration.generated=1" + 400 * "0", "expected float"),
        ("calibration.samples=" + 5000 * "[", "expected int"),
        ("calibration.samples=" + 5000 * "1", "expected int"),
        ("calibration.samples=2020-01-01", "expected int"),
        ("=3", "KEY=VALUE"),
        ("transform", "KEY=VALUE"),
        ("transform.=3", "unknown key ''"),
        ("name=", "one line"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_change_that_cannot_be_made(change: str, meant: str) -> None:
    said = refused("plan", "demo", "--set", change)
    assert meant in said and len(said) < 900


@pytest.mark.case("D2")
def test_a_file_with_a_wrong_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nsharing = "block"\n[weights]\nformat = "mxfp4"\n')
    assert "did you mean 'transform.sharing'" in refused("plan", "demo", "--recipe", file)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("sharing", {"sharing": "sites"}),
    ("sharing", {"sharing": ["site"]}),
    ("weights", {"weights": "mxfp4"}),
    ("weights", {"weights": ("mxfp4", "even")}),
    ("weights", {"weights": None}),
    ("transform", {"transform": "hadamard"}),
    ("rounding", {"rounding": GPTQ}),
    ("ignore", {"ignore": "down_proj"}),
    ("ignore", {"ignore": [1]}),
    ("calibration", {"calibration": None}),
    ("calibration", {"calibration": {"samples": 4}}),
    ("accumulation", {"accumulation": "slow"}),
    ("name", {"name": 5}),
    ("name", {"name": ""}),
    ("name", {"name": "two\nlines"}),
    ("summary", {"summary": "half \ud83d"}),
    ("tuning", {"tuning": True}),
]


@pytest.mark.case("D4")
@pytest.mark.parametrize(("key", "change"), BAD, ids=str)
def test_replace_is_checked(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=key):
        dataclasses.replace(load_recipe("duquant++"), **change)


PARTS: list[tuple[Any, dict[str, Any]]] = [
    (QuantizerChoice("mxfp4"), {"rule": None}),
    (QuantizerChoice("mxfp4"), {"format": 4}),
    (Smoothing(0.5), {"alpha": "0.5"}),
    (Smoothing(0.5), {"alpha": 2}),
    (Smoothing(0.5), {"skip": "o"}),
    (CalibrationChoice(), {"samples": -1}),
    (CalibrationChoice(), {"samples": 2.0}),
    (CalibrationChoice(), {"seq_len": True}),
    (CalibrationChoice(), {"generated": float("nan")}),
    (GPTQ(), {"scales": "walkd"}),
    (GPTQ(), {"damping": "0.1"}),
    (OutlierRotation(), {"steps": 2.5}),
    (OutlierRotation(), {"redraw": 1}),
    (Tuning(), {"scope": "layer"}),
    (Tuning(), {"steps": "many"}),
]


@pytest.mark.case("D4")
@pytest.mark.parametrize(("part", "change"), PARTS, ids=str)
def test_parts_of_a_recipe_are_checked(part: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(part, **change)


@pytest.mark.case("D4")
def test_what_is_right_stays_right() -> None:
    recipe = dataclasses.replace(load_recipe("duquant++"), ignore=["down_proj"], sharing="block")
    assert recipe.ignore == ("down_proj",) and Recipe.from_toml(recipe.to_toml(), "x") == recipe
    assert dataclasses.replace(recipe, smoothing=None).smoothing is None
    assert type(dataclasses.replace(GPTQ(), damping=1).damping) is float
