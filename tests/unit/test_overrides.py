"""Tables that change a recipe for some sites: what they name, what they change, what is refused."""

from typing import Any

import pytest

from mxrot.errors import ConfigError
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.recipe import Recipe, load_recipe
from mxrot.rules import Rules

DOWN = '[[override]]\nsites = ["down_proj"]\nformat = "mxfp8_e4m3"\n'
LAST = '[[override]]\nblocks = [-2, -1]\nweights = "none"\n'


def recipe(text: str, name: str = "mxrot") -> Recipe:
    return Recipe.from_toml(f"{load_recipe(name).to_toml()}\n{text}", "mine.toml")


def rules(text: str, name: str = "mxrot", blocks: int = 6) -> Rules:
    return Rules(recipe(text, name), LLAMA, blocks)


def refusals(found: Rules) -> list[str]:
    return [str(problem) for problem in found.problems()]


def test_three_lines_each_are_enough() -> None:
    found = rules(DOWN + LAST)
    assert refusals(found) == []
    for index in range(6):
        sites = {site.name for site in found.active_sites(index)}
        assert sites == (set() if index >= 4 else {"qkv", "o", "gate_up", "down"})
    base = load_recipe("mxrot")
    down, o = found.of(0, "down"), found.of(0, "o")
    assert down.weights.format == "mxfp8_e4m3" and down.activations is not None
    assert down.activations.format == "mxfp8_e4m3"
    assert (down.transform, down.rounding, down.sharing) == (base.transform, base.rounding, base.sharing)
    assert o == base and len(found.in_use) == 2


@pytest.mark.parametrize(
    ("sites", "named"),
    [
        ("down", {"down"}),
        ("*_proj", {"qkv", "o", "gate_up", "down"}),
        ("model.layers.1.mlp.*", {"gate_up", "down"}),
        ("gate_up", {"gate_up"}),
    ],
)
def test_patterns_are_of_sites_or_of_linears(sites: str, named: set[str]) -> None:
    found = rules(f'[[override]]\nsites = ["{sites}"]\nrounding = {{method = "rtn"}}\n')
    assert {site.name for site in LLAMA.sites if found.of(1, site.name).rounding.name == "rtn"} == named


def test_later_tables_win_key_by_key() -> None:
    one = '[[override]]\nsites = ["down"]\nweights = {format = "mxfp8_e4m3", rule = "floor"}\nactivations = "none"\n'
    two = '[[override]]\nblocks = [0, 0]\nweights.rule = "mse"\n'
    found = rules(one + two)
    first, second = found.of(0, "down"), found.of(1, "down")
    assert (first.weights.format, first.weights.rule, first.activations) == ("mxfp8_e4m3", "mse", None)
    assert (second.weights.format, second.weights.rule) == ("mxfp8_e4m3", "floor")
    left = '[[override]]\nsites = ["down"]\nweights = "none"\n'
    assert rules(left + DOWN).of(0, "down").weights.format == "mxfp8_e4m3"
    assert "down" not in {site.name for site in rules(DOWN + left).active_sites(0)}
    kept = rules(left + "[[override]]\nblocks = [0, 0]\nrounding.damping = 0.5\n")
    assert "down" not in {site.name for site in kept.active_sites(0)}, "only a table that quantizes it takes it back"


def test_a_named_method_starts_from_its_own_defaults() -> None:
    found = rules('[[override]]\nsites = ["o"]\ntransform.method = "hadamard"\nrounding.method = "gptq"\n').of(0, "o")
    assert found.transform == load_recipe("hadamard").transform and found.sharing == "block"
    assert (
        found.rounding
        == Recipe.from_table(
            {"name": "x", "weights": {"format": "mxfp4"}, "rounding": {"method": "gptq"}}, "x"
        ).rounding
    )


def test_format_leaves_inputs_that_are_not_quantized() -> None:
    base = load_recipe("rtn").changed({"activations": "none", "override": [{"format": "mxint8"}]})
    found = Rules(base, LLAMA, 1).of(0, "o")
    assert found.weights.format == "mxint8" and found.activations is None


def test_what_any_site_needs_the_recipe_needs() -> None:
    plain = load_recipe("rtn")
    assert plain.is_data_free and not plain.looks_at_original and not plain.has_transform
    changed = recipe('[[override]]\nsites = ["o"]\nrounding = {method = "gptq", target = "original"}\n', "rtn")
    assert not changed.is_data_free and changed.looks_at_original and not changed.has_transform
    assert recipe('[[override]]\nsites = ["o"]\ntransform.method = "hadamard"\n', "rtn").has_transform


@pytest.mark.parametrize("text", ["", DOWN, DOWN + LAST, DOWN + '[[override]]\nsites = ["o"]\ntransform.steps = 7\n'])
def test_they_survive_toml_and_back_and_changes_of_the_rest(text: str) -> None:
    found = recipe(text, "duquant++")
    assert Recipe.from_toml(found.to_toml(), "again.toml") == found
    changed = found.changed({"calibration.samples": 3})
    assert changed.override == found.override and changed.calibration.samples == 3
    assert found.changed({"override": "none"}) == load_recipe("duquant++")
    assert hash(found) == hash(Recipe.from_toml(found.to_toml(), "again.toml"))


MISTAKES: list[tuple[str, str]] = [
    ('[[override]]\nsites = ["o"]\n', r"mine\.toml: override 1: changes nothing"),
    (f'{DOWN}[[override]]\nsite = ["o"]\nformat = "mxfp4"\n', r"override 2: unknown key 'site'; did you mean 'sites'"),
    ('[[override]]\nsites = []\nformat = "mxfp4"\n', r"sites = \[\] names none"),
    ('[[override]]\nsites = "o"\nformat = "mxfp4"\n', r"override 1: sites: expected a list of strings"),
    ('[[override]]\nblocks = [3, 1]\nformat = "mxfp4"\n', r"blocks = \[3, 1\]: the first comes after the last"),
    ('[[override]]\nblocks = 3\nformat = "mxfp4"\n', r"blocks: expected \[first, last\], got 3"),
    ('[[override]]\nblocks = [true, 1]\nformat = "mxfp4"\n', r"blocks: expected \[first, last\]"),
    ('[[override]]\nweights = "none"\nrounding.method = "rtn"\n', r'weights = "none" .* rounding\.method says nothing'),
    ('[[override]]\nweights = "all"\n', r"weights: expected a table with keys, or \"none\", got 'all'"),
    ('[[override]]\nrounding = "none"\n', r"rounding: expected a table with keys, got 'none'"),
    ('[override]\nformat = "mxfp4"\n', r"mine\.toml: override: expected tables, got .*; write \[\[override\]\]"),
    ('[[override]]\nformat = "mxfp5"\n', r"^recipe mxrot, override 1: .*unknown format 'mxfp5'; did you mean 'mxfp4'"),
    ("[[override]]\ntransform.stepps = 3\n", r"^recipe mxrot, override 1: transform: unknown key 'stepps'"),
    ('[[override]]\nactivations.rule = "mse"\n', r"override 1: activations: rule 'mse' is for weights only"),
    ('[[override]]\nrounding.damping = "x"\n', r"override 1: rounding\.damping: expected float, got 'x'"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_are_named_where_the_recipe_is_read(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(text)


PROBLEMS: list[tuple[str, str]] = [
    ('sites = ["dwon"]', r"^recipe mxrot: override 1: names no site that is quantized; .*'dwon'.* did you mean 'down'"),
    ("blocks = [6, 9]", r"override 1: names no site; blocks = \[6, 9\], and the model has 6, from 0 to 5"),
    ('sites = ["q_proj"]', r"names model\.layers\.0\.self_attn\.q_proj, and not all linears of site 'qkv', .*\"qkv\""),
]


@pytest.mark.parametrize(("named", "message"), PROBLEMS)
def test_what_does_not_fit_the_model(named: str, message: str) -> None:
    (problem,) = rules(f'[[override]]\n{named}\nactivations.rule = "floor"\n').problems()
    with pytest.raises(ConfigError, match=message):
        raise problem


def test_linears_that_are_ignored_need_not_be_named() -> None:
    base: dict[str, Any] = {"ignore": ["k_proj", "v_proj"], "override": [{"sites": ["q_proj"], "format": "mxfp8_e4m3"}]}
    found = Rules(load_recipe("rtn").changed(base), LLAMA, 1)
    assert refusals(found) == [] and found.of(0, "qkv").weights.format == "mxfp8_e4m3"
    assert found.input_block("model.layers.0.self_attn.k_proj") is None
    assert found.input_block("model.layers.0.self_attn.q_proj") == 32


def test_what_each_allows_and_both_do_not() -> None:
    both = '[[override]]\nsites = ["down"]\nformat = "nvfp4"\n[[override]]\nblocks = [0, 0]\nweights.rule = "mse"\n'
    (message,) = refusals(rules(both, "rtn"))
    assert message.startswith("recipe rtn, override 1, 2: weights: format nvfp4 has no scale rule 'mse'")
