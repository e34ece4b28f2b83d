from pathlib import Path
from typing import Any

import pytest

from mxrot.errors import ConfigError
from mxrot.recipe import Recipe, load_recipe
from mxrot.rounding.gptq import GPTQ
from mxrot.rounding.rtn import RoundToNearest
from mxrot.sections import CalibrationChoice, QuantizerChoice, Smoothing
from mxrot.transforms.hadamard import Hadamard, Identity
from mxrot.transforms.outlier import OutlierRotation

MXFP4 = {"format": "mxfp4"}
SMALLEST: dict[str, Any] = {"name": "mine", "weights": MXFP4}
FULL: dict[str, Any] = {
    "name": "mine",
    "summary": 'a "quoted" \\ summary \u00e9\x7f\t\u2028\r\n',
    "source": "arXiv 2604.17789",
    "ignore": ["lm_head", "model.layers.0.*"],
    "weights": {"format": "mxfp4", "rule": "mse"},
    "activations": {"format": "mxfp8_e4m3", "rule": "rceil"},
    "smoothing": {"alpha": 0.25, "skip": ["o"], "by": "moments"},
    "transform": {
        "method": "outlier",
        "sharing": "block",
        "steps": 7,
        "score": "error",
        "peak": "range",
        "pivot": "row",
        "redraw": False,
        "sample": "mean",
        "rows": 3,
    },
    "rounding": {"method": "gptq", "damping": 1e-05, "scales": "fixed", "columns": "descending"},
    "calibration": {"samples": 3, "seq_len": 64},
}


def merged(**sections: Any) -> dict[str, Any]:
    """FULL with some keys replaced; those of a section are merged into it."""
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in FULL.items()}
    for key, value in sections.items():
        table[key] = {**table[key], **value} if isinstance(value, dict) and key in table else value
    return table


def test_every_key_arrives() -> None:
    recipe = Recipe.from_table(FULL, "mine.toml")
    assert recipe == Recipe(
        name="mine",
        weights=QuantizerChoice("mxfp4", "mse"),
        transform=OutlierRotation(7, "error", "range", "row", False, "mean", 3),
        rounding=GPTQ(1e-05, "fixed", "descending"),
        summary=FULL["summary"],
        source="arXiv 2604.17789",
        activations=QuantizerChoice("mxfp8_e4m3", "rceil"),
        sharing="block",
        smoothing=Smoothing(0.25, ("o",), "moments"),
        calibration=CalibrationChoice(3, 64),
        ignore=("lm_head", "model.layers.0.*"),
    )
    assert Recipe.from_toml(recipe.to_toml(), "mine.toml") == recipe


def test_what_is_left_out_has_a_default() -> None:
    recipe = Recipe.from_table(SMALLEST, "mine.toml")
    assert recipe == Recipe("mine", QuantizerChoice("mxfp4"), Identity(), RoundToNearest())
    assert recipe.activations is recipe.smoothing is None
    assert recipe.weights.quantizer().rule.name == "even"
    assert Recipe.from_toml(recipe.to_toml(), "mine.toml") == recipe


def test_every_character_survives_toml() -> None:
    text = "".join(map(chr, range(0x2100))) + "\U0001f600"
    recipe = Recipe.from_table({**SMALLEST, "summary": text, "ignore": [text]}, "mine.toml")
    assert Recipe.from_toml(recipe.to_toml(), "mine.toml") == recipe


def test_an_integer_will_do_for_a_float() -> None:
    recipe = Recipe.from_table(merged(smoothing={"alpha": 1}, rounding={"damping": 1}), "mine.toml")
    assert recipe.smoothing == Smoothing(1.0, ("o",), "moments") and recipe.rounding == GPTQ(1.0, "fixed", "descending")


# What it refuses, with the key in its message

MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    # unknown keys at each level
    ("top level", merged(colour="red"), r"^mine\.toml: unknown key 'colour'"),
    ("table", merged(extra={"a": 1}), r"^mine\.toml: unknown key 'extra'"),
    ("weights", merged(weights={"bits": 4}), r"^mine\.toml: weights: unknown key 'bits'; known: format, rule"),
    ("activations", merged(activations={"bits": 4}), r"activations: unknown key 'bits'"),
    ("smoothing", merged(smoothing={"beta": 4}), r"smoothing: unknown key 'beta'; known: alpha, skip, by"),
    (
        "transform",
        merged(transform={"stepps": 4}),
        r"did you mean 'steps'\? known: steps, method, sharing, block",
    ),
    (
        "rounding",
        merged(rounding={"damp": 4}),
        r"did you mean 'damping' or 'dampings'\? known: damping, .*method, scales",
    ),
    ("calibration", merged(calibration={"n": 4}), r"calibration: unknown key 'n'; known: samples, seq_len"),
    ("rtn", {**SMALLEST, "rounding": {"method": "rtn", "a": 1}}, r"rounding: unknown key 'a'; known: method"),
    # missing ones
    ("no name", {"weights": MXFP4}, r"^mine\.toml: 'name' is missing"),
    ("no weights", {"name": "mine"}, r"^mine\.toml: 'weights' is missing"),
    ("no format", merged(weights=None) | {"weights": {"rule": "even"}}, r"weights: 'format' is missing"),
    ("no alpha", {**SMALLEST, "smoothing": {}}, r"smoothing: 'alpha' is missing"),
    ("no transform method", {**SMALLEST, "transform": {"steps": 3}}, r"transform: 'method' is missing"),
    ("no rounding method", {**SMALLEST, "rounding": {}}, r"rounding: 'method' is missing"),
    # wrong types
    ("name", merged(name=3), r"^mine\.toml: name: expected str, got 3"),
    ("not a table", merged(weights="mxfp4"), r"^mine\.toml: 'weights' must be a table"),
    ("list", merged(calibration=[1]), r"^mine\.toml: 'calibration' must be a table"),
    ("transform", merged(transform="outlier"), r"^mine\.toml: 'transform' must be a table"),
    ("ignore", merged(ignore="lm_head"), r'ignore: expected a list of strings, .*\["lm_head"\].*, got .lm_head'),
    ("ignored", merged(ignore=["a", 1]), r"ignore: expected a list of strings"),
    ("skip", merged(smoothing={"skip": "o"}), r"smoothing\.skip: expected a list of strings"),
    ("clip", merged(weights={"clip": "0.9"}), r"^mine\.toml: weights\.clip: expected float, got '0\.9'"),
    ("alpha", merged(smoothing={"alpha": "0.5"}), r"smoothing\.alpha: expected float, got '0\.5'"),
    ("boolean alpha", merged(smoothing={"alpha": True}), r"smoothing\.alpha: expected float, got True"),
    ("steps", merged(transform={"steps": 1.5}), r"transform\.steps: expected int, got 1\.5"),
    ("boolean steps", merged(transform={"steps": True}), r"transform\.steps: expected int, got True"),
    ("redraw", merged(transform={"redraw": 1}), r"transform\.redraw: expected bool, got 1"),
    ("peak", merged(transform={"peak": "max"}), r"transform\.peak: 'max' is not one of abs, range"),
    ("unhashable peak", merged(transform={"peak": ["abs"]}), r"transform\.peak: \['abs'\] is not one of "),
    ("sharing", merged(transform={"sharing": "layer"}), r"transform\.sharing: 'layer' is not one of site, block"),
    ("samples", merged(calibration={"samples": 2.0}), r"calibration\.samples: expected int, got 2\.0"),
    ("method", merged(transform={"method": ["outlier"]}), r"transform\.method: expected str, got \['outlier'\]"),
    ("rounding method", merged(rounding={"method": 4}), r"rounding\.method: expected str, got 4"),
    # names that do not exist
    ("format", merged(weights={"format": "fp3"}), r"^recipe mine: weights: unknown format 'fp3'; known: mxfp4"),
    ("rule", merged(weights={"rule": "ceil"}), r"weights: unknown scale rule 'ceil'; did you mean 'rceil'"),
    ("method", merged(transform={"method": "fft"}), r"transform\.method: unknown transform 'fft'; known: dual, had"),
    ("method", merged(rounding={"method": "up"}), r"rounding\.method: unknown rounding 'up'; known: rtn"),
    # combinations that cannot work
    ("rule of no format", merged(weights={"rule": "absmax"}), r"weights: format mxfp4 has no scale rule 'absmax'"),
    (
        "rule of other activations",
        merged(activations={"rule": "x3"}),
        r"^recipe mine: activations: format mxfp8_e4m3 has no scale rule 'x3'; it has even",
    ),
    ("weights only", merged(activations={"rule": "mse"}), r"activations: rule 'mse' is for weights only"),
    (
        "target of unquantized inputs",
        merged(rounding={"inputs": "unquantized", "target": "original"}),
        r'^rounding gptq: target = "original" makes up for what quantized inputs lack, and needs inputs = "quantized"$',
    ),
    ("descending", merged(rounding={"scales": "reached"}), r'^rounding gptq: columns = "descending" needs scales'),
    (
        "reached",
        merged(weights={"rule": "log256"}, rounding={"scales": "reached", "columns": "natural"}),
        r"^rounding gptq: the scale rule 'log256' of mxfp4 looks at the whole tensor; set scales",
    ),
    (
        "error of what",
        {k: v for k, v in FULL.items() if k != "activations"},
        r'^recipe mine: transform score = "error" or "joint" needs activations',
    ),
    (
        "error of blocks that do not fit",
        merged(activations={"format": "int4_g128", "rule": "absmax"}),
        r'transform score = "error" sees blocks of 32, and activations in int4_g128 have blocks of 128',
    ),
    # numbers out of range
    ("clip", merged(weights={"clip": 0}), r"^recipe mine: weights: clip 0\.0 is not above 0 and at most 1"),
    ("clip", merged(activations={"clip": 1.1}), r"^recipe mine: activations: clip 1\.1 is not above 0 and at most 1"),
    ("alpha", merged(smoothing={"alpha": 1.5}), r"^smoothing: alpha 1\.5 is not in \[0, 1\]"),
    ("alpha", merged(smoothing={"alpha": -0.1}), r"smoothing: alpha -0\.1 is not in \[0, 1\]"),
    ("alpha", merged(smoothing={"alpha": float("nan")}), r"smoothing: alpha nan is not in \[0, 1\]"),
    ("samples", merged(calibration={"samples": 0}), r"^calibration: samples must be positive"),
    ("seq_len", merged(calibration={"seq_len": 1}), r"calibration: seq_len must be at least 2"),
    ("steps", merged(transform={"steps": 0}), r"^transform outlier: steps and rows must be positive"),
    ("damping", merged(rounding={"damping": 0}), r"^rounding gptq: damping must be positive"),
    ("damping", merged(rounding={"damping": float("inf")}), r"^rounding gptq: damping must be positive and finite"),
]


@pytest.mark.parametrize(("table", "message"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_a_mistake_is_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.from_table(table, "mine.toml")
    assert "\n" not in str(caught.value)


def test_the_table_that_is_read_is_left_as_it_was() -> None:
    table = merged()
    Recipe.from_table(table, "mine.toml")
    assert table == FULL


# Files


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(Recipe.from_table(FULL, "x").to_toml(), encoding="utf-8", newline="")
    assert load_recipe(file) == load_recipe(str(file)) == Recipe.from_table(FULL, "x")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^no recipe 'rnt': not a file, and not one of .*rtn"):
        load_recipe("rnt")
    with pytest.raises(ConfigError, match=r"^no recipe .*: not a file"):
        load_recipe(tmp_path)
    file = tmp_path / "mine.toml"
    file.write_text("name = mine")
    with pytest.raises(ConfigError, match=r"^mine\.toml: not TOML: "):
        load_recipe(file)
    file.write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match=r"mine\.toml: not a text file"):
        load_recipe(file)


# changed()


def test_changes_by_dotted_keys() -> None:
    recipe = Recipe.from_table(FULL, "x")
    changed = recipe.changed({"transform.steps": 9, "weights.rule": "even", "name": "other", "ignore": []})
    table = merged(transform={"steps": 9}, weights={"rule": "even"}, name="other", ignore=[])
    assert changed == Recipe.from_table(table, "x")
    assert recipe == Recipe.from_table(FULL, "x")


def test_a_section_that_was_not_there_can_be_added() -> None:
    recipe = Recipe.from_table(SMALLEST, "x")
    assert recipe.changed({"smoothing.alpha": 0.5}).smoothing == Smoothing(0.5)
    assert recipe.changed({"activations.format": "mxfp4"}).activations == QuantizerChoice("mxfp4")


@pytest.mark.parametrize("order", [1, -1])
def test_a_new_method_drops_the_options_of_the_old_one(order: int) -> None:
    """But not those that come with it, in whatever order; the sharing stays."""
    recipe = Recipe.from_table(FULL, "x")
    changed = recipe.changed({"transform.method": "hadamard", "rounding.method": "rtn"})
    assert changed == Recipe.from_table(
        merged() | {"transform": {"method": "hadamard", "sharing": "block"}, "rounding": {"method": "rtn"}}, "x"
    )
    changes = list({"transform.method": "outlier", "transform.steps": 5, "transform.sharing": "site"}.items())
    back = changed.changed(dict(changes[::order]))
    assert back.transform == OutlierRotation(steps=5) and back.sharing == "site"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transform.stepps": 3}, r"^recipe mine with transform\.stepps: transform: unknown key 'stepps'"),
        ({"colour": 3}, r"^recipe mine with colour: unknown key 'colour'"),
        ({"colour.hue": 3}, r"unknown key 'colour'"),
        ({"name.first": "x"}, r"^recipe mine: unknown key 'name\.first'; 'name' is not a table"),
        ({"weights.rule.name": "x"}, r"^recipe mine: unknown key 'weights\.rule\.name'; 'rule' is not a table"),
        ({"weights": "mxfp4"}, r"'weights' must be a table"),
        ({"calibration.samples": 0}, r"calibration: samples must be positive"),
        ({"rounding.scales": "reached"}, r'columns = "descending" needs scales = "fixed"'),
        ({"transform.method": "fft"}, r"transform\.method: unknown transform 'fft'"),
    ],
    ids=str,
)
def test_a_bad_change_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_table(FULL, "x").changed(changes)


# What the pipeline asks a recipe


def test_what_needs_data() -> None:
    plain = Recipe.from_table(SMALLEST, "x")
    assert plain.is_data_free and plain.changed({"transform.method": "hadamard"}).is_data_free
    for changes in ({"smoothing.alpha": 0.5}, {"transform.method": "outlier"}, {"rounding.method": "gptq"}):
        assert not plain.changed(changes).is_data_free


def test_what_is_applied_at_run_time() -> None:
    plain = Recipe.from_table(SMALLEST, "x")
    assert not plain.has_transform and plain.changed({"transform.method": "hadamard"}).has_transform
    smoothed = plain.changed({"smoothing.alpha": 0.5})
    assert not smoothed.has_transform and smoothed.changed({"transform.sharing": "block"}).has_transform


@pytest.mark.parametrize(
    ("weights", "activations", "expected"),
    [("mxfp4", "", 32), ("nvfp4", "nvfp4", 16), ("int4_g128", "mxfp4", 128), ("mxfp4", "int4_g128", 128)],
)
def test_the_block_that_inputs_must_fill(weights: str, activations: str, expected: int) -> None:
    choice = QuantizerChoice(activations) if activations else None
    recipe = Recipe("x", QuantizerChoice(weights), Identity(), RoundToNearest(), activations=choice)
    assert recipe.input_block == expected
    rotated = Recipe("x", QuantizerChoice(weights), Hadamard(block=64), RoundToNearest(), activations=choice)
    assert rotated.input_block == max(64, expected)


@pytest.mark.parametrize("section", ["activations", "smoothing", "tuning"])
def test_a_section_can_be_taken_out(section: str) -> None:
    base = load_recipe("mxrot-tuned").changed({"smoothing.alpha": 0.5})
    gone = {section: "none"} | ({"tuning": "none"} if section == "activations" else {})
    changed = base.changed(gone)
    assert getattr(base, section) is not None and getattr(changed, section) is None
    assert changed.changed({}) == changed


def test_only_a_section_can_be_taken_out() -> None:
    with pytest.raises(ConfigError, match="unknown key 'window'"):
        load_recipe("rtn").changed({"window": "none"})


@pytest.mark.parametrize("score", ["error", "joint"])
@pytest.mark.parametrize("part", ["weights", "activations"])
def test_a_score_sees_no_longer_blocks_than_the_transform(score: str, part: str) -> None:
    """Found before anything is loaded; the score of the inputs alone does not look at the weights."""
    base = load_recipe("duquant++")
    changes = {"transform.score": score, f"{part}.format": "int4_g128", f"{part}.rule": "absmax"}
    if (score, part) == ("error", "weights"):
        assert base.changed(changes).weights.format == "int4_g128"
        return
    with pytest.raises(ConfigError, match=f'score = "{score}" sees blocks of 32, and {part} in int4_g128 have'):
        base.changed(changes)
