"""What sites may be raised to, and how a recipe says so."""

import pytest

from mxrot.errors import ConfigError
from mxrot.recipe import Recipe, load_recipe
from mxrot.search.bits import Bits, Cell
from mxrot.search.choices import Choice, base_choice, everywhere, parse_choices
from mxrot.search.written import mixture_recipe, raised_runs

BOTH, SIX, INPUTS = (
    Choice("mxfp8_e4m3", "mxfp8_e4m3"),
    Choice("mxfp6_e2m3", "mxfp6_e2m3"),
    Choice("mxfp4", "mxfp8_e4m3"),
)
KINDS = ("qkv", "o", "gate_up", "down")


def test_a_name_is_of_both_and_two_are_apart() -> None:
    found = parse_choices("mxfp4, mxfp6_e2m3,mxfp8_e4m3,mxfp4/mxfp8_e4m3,mxfp8_e4m3", load_recipe("mxrot"), False)
    assert found == (SIX, BOTH, INPUTS)
    assert [choice.spelled for choice in found] == ["mxfp6_e2m3", "mxfp8_e4m3", "mxfp4/mxfp8_e4m3"]


def test_inputs_only_leaves_weights() -> None:
    assert parse_choices("mxfp4,mxfp8_e4m3", load_recipe("mxrot"), True) == (INPUTS,)
    assert INPUTS.in_words == "weights in mxfp4, inputs in mxfp8_e4m3" and BOTH.in_words == "mxfp8_e4m3"


def test_weights_alone_where_inputs_are_not_quantized() -> None:
    assert parse_choices("mxfp4,mxfp8_e4m3", load_recipe("w4a16"), False) == (Choice("mxfp8_e4m3", None),)


@pytest.mark.parametrize(
    ("text", "name", "inputs_only", "said"),
    [
        ("mxfp5", "mxrot", False, "--choices mxfp5: unknown format 'mxfp5'; did you mean 'mxfp4'"),
        ("mxfp4/mxfp9", "mxrot", False, "--choices mxfp4/mxfp9: unknown format 'mxfp9'"),
        ("mxfp4", "mxrot", False, "--choices mxfp4: names nothing but what recipe mxrot has already"),
        ("mxfp8_e4m3", "w4a16", True, "recipe w4a16 does not quantize inputs"),
        ("mxfp4/mxfp8_e4m3", "w4a16", False, "recipe w4a16 does not quantize inputs"),
        ("mxfp4/mxfp8_e4m3", "mxrot", True, "with --inputs-only each choice is one format"),
    ],
)
def test_refused(text: str, name: str, inputs_only: bool, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_choices(text, load_recipe(name), inputs_only)
    assert said in str(caught.value)


@pytest.mark.parametrize("choice", [BOTH, INPUTS, Choice("mxfp8_e4m3", "mxfp4"), Choice("mxfp6_e2m3", "mxfp8_e4m3")])
def test_everywhere_sets_both_formats(choice: Choice) -> None:
    base = load_recipe("mxrot")
    raised = everywhere(base, choice).overridden([0])
    assert raised is not None and base_choice(raised) == choice
    assert (raised.transform, raised.rounding, raised.calibration) == (base.transform, base.rounding, base.calibration)


def test_runs_put_neighbours_together_and_kinds_that_are_alike() -> None:
    mixture = {Cell(kind, block): BOTH for kind in ("o", "down") for block in (0, 1, 2, 5)}
    mixture |= {Cell("qkv", 2): SIX, Cell("qkv", 3): BOTH}
    found = raised_runs(mixture, KINDS)
    assert [(one.kinds, one.blocks, one.choice) for one in found] == [
        (("o", "down"), (0, 2), BOTH),
        (("qkv",), (2, 2), SIX),
        (("qkv",), (3, 3), BOTH),
        (("o", "down"), (5, 5), BOTH),
    ]
    assert [one.blocks_in_words for one in found] == ["0 to 2", "2", "3", "5"]


def test_a_mixture_is_written_and_called_one() -> None:
    base = load_recipe("mxrot")
    found = mixture_recipe(base, {Cell("down", 1): INPUTS}, KINDS, Bits(4.25, 4.5), "owner/a model")
    assert found.name == "mxrot-mixture-4.25-4.50"
    assert found.summary.startswith("A mixture of mxfp4, mxfp4/mxfp8_e4m3: 4.250 bits a weight, 4.500 an input; found")
    assert "W4A4" not in found.to_toml()
    read = Recipe.from_toml(found.to_toml(), "mixture.toml")
    assert read == found
    assert [one.to_table() for one in read.override] == [
        {"sites": ["down"], "blocks": [1, 1], "activations": {"format": "mxfp8_e4m3"}}
    ]
