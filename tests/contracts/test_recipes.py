"""What every recipe that comes with mxrot owes."""

import pytest
import tomllib

from mxrot.errors import ConfigError
from mxrot.recipe import BUILTIN_FOLDER, Recipe, builtin_recipes, load_recipe

each = pytest.mark.parametrize("name", builtin_recipes())


def test_there_are_recipes() -> None:
    assert set(builtin_recipes()) == {path.stem for path in BUILTIN_FOLDER.iterdir()} >= {"rtn", "duquant++"}


@each
def test_it_is_called_like_its_file(name: str) -> None:
    assert load_recipe(name).name == name


@each
def test_it_says_what_it_is_in_one_line(name: str) -> None:
    recipe = load_recipe(name)
    for text in (recipe.summary, recipe.source):
        assert text and text.strip() == text and "\n" not in text
    assert not recipe.summary.endswith(".")


@each
def test_it_survives_toml_and_back(name: str) -> None:
    recipe = load_recipe(name)
    again = Recipe.from_toml(recipe.to_toml(), "again")
    assert again == recipe and again.to_toml() == recipe.to_toml()
    assert recipe.changed({}) == recipe


@each
def test_its_file_says_nothing_that_is_ignored(name: str) -> None:
    """Every key of the file is a key of the recipe written out in full, with the value that the file gives."""
    written = tomllib.loads(builtin_recipes()[name].read_text())
    full = tomllib.loads(load_recipe(name).to_toml())
    for key, value in written.items():
        if isinstance(value, dict):
            assert value.items() <= full[key].items()
        else:
            assert full[key] == value


@each
def test_a_misspelt_key_in_any_section_is_refused(name: str) -> None:
    text = load_recipe(name).to_toml()
    sections = ("weights", "activations", "transform", "rounding", "calibration")
    for section in [one for one in sections if one != "activations" or load_recipe(name).activations is not None]:
        spoilt = text.replace(f"[{section}]\n", f"[{section}]\nstepps = 3\n")
        assert spoilt != text
        with pytest.raises(ConfigError, match=rf"^{section}\.toml: {section}: unknown key 'stepps'"):
            Recipe.from_toml(spoilt, f"{section}.toml")


@each
def test_it_names_formats_and_rules_that_exist(name: str) -> None:
    recipe = load_recipe(name)
    quantizers = [recipe.weights.quantizer()]
    if recipe.activations is not None:
        quantizers.append(recipe.activations.quantizer())
        assert quantizers[1].rule.dynamic
    assert all(q.rule.name in q.format.rules for q in quantizers)
    assert all(recipe.input_block % (q.format.block or 1) == 0 for q in quantizers)
