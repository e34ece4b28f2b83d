"""The registry: names, bits, rules, and what the errors say."""

import pytest
import torch

from mxrot.errors import ConfigError, NumericsError
from mxrot.formats import FORMATS, RULES, get_format, get_rule, quantize

BITS_PER_ELEMENT = {
    "mxfp4": 4.25,
    "mxfp6_e2m3": 6.25,
    "mxfp6_e3m2": 6.25,
    "mxfp8_e4m3": 8.25,
    "mxfp8_e5m2": 8.25,
    "mxint8": 8.25,
    "nvfp4": 4.5,
    "amxfp4": 4.5,
    "int4_g32": 4.5,
    "int4_g128": 4.125,
    "int4_g32_asym": 4.625,
    "int4_g128_asym": 4.15625,
    "int4_row_asym": 4,
    "int2_g32_asym": 2.5625,
    "int2_row_asym": 2,
    "int4_row": 4,
    "lut2": 2.375,
    "lut2_g128": 2.375,
    "int8_row": 8,
}


def test_bits_per_element() -> None:
    assert {name: format.bits_per_element for name, format in FORMATS.items()} == BITS_PER_ELEMENT


def test_names() -> None:
    assert all(format.name == name and get_format(name) is format for name, format in FORMATS.items())
    assert all(rule.name == name and get_rule(name) is rule for name, rule in RULES.items())


def test_every_rule_serves_a_format() -> None:
    assert {rule for format in FORMATS.values() for rule in format.rules} == set(RULES)


def test_even_is_the_default_rule_of_mx_formats() -> None:
    assert {format.default_rule for name, format in FORMATS.items() if name.startswith("mx")} == {"even"}
    assert get_format("mxfp4").rule() is get_rule("even")


def test_which_rules_are_for_weights_alone() -> None:
    assert [name for name, rule in RULES.items() if not rule.dynamic] == [
        *("7.25", "mse", "search", "x3-search", "absmax-search", "lloyd", "spaced")
    ]


def test_the_checkpoint_layout() -> None:
    assert get_format("mxfp4").compressed_tensors == "mxfp4-pack-quantized"


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        get_format("mxfp3")
    start, known = str(caught.value).split(" known: ")
    assert start.startswith("unknown format 'mxfp3'; did you mean 'mxfp4' or ")
    assert sorted(known.split(", ")) == sorted(FORMATS)


def test_an_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        get_rule("ceil")
    others = [name for name in RULES if name != "rceil"]
    known = ", ".join(["rceil", *others])
    assert str(caught.value) == f"unknown scale rule 'ceil'; did you mean 'rceil'? known: {known}"


def test_a_rule_of_another_format_lists_those_it_has() -> None:
    with pytest.raises(ConfigError) as caught:
        get_format("mxfp8_e4m3").rule("x3")
    assert str(caught.value) == ("format mxfp8_e4m3 has no scale rule 'x3'; it has even, floor, rceil, mse, log256")


def test_an_fp16_scale_that_overflows_is_an_error() -> None:
    """65504 * 7 is the most that INT4 with FP16 scales can hold."""
    x = torch.zeros(1, 32)
    x[0, 5] = 65504.0 * 7
    assert quantize(x, get_format("int4_g32")).dequantize()[0, 5] == 65504.0 * 7
    message = r"^k_proj: a block scale overflows fp16; the largest \|x\| is 9\.17e"
    with pytest.raises(NumericsError, match=message):
        quantize(x * 2, get_format("int4_g32"), name="k_proj")
