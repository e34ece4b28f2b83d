"""How keys and values are kept: what a scheme says, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from mxrot.errors import ConfigError
from mxrot.formats import FORMATS, CacheScheme, TensorQuantizer


def scheme(keys: str = "mxfp4", values: str = "mxfp4", **more: Any) -> CacheScheme:
    return CacheScheme(TensorQuantizer.of(keys), TensorQuantizer.of(values), **more)


@pytest.mark.parametrize(
    ("keys", "values", "expected"),
    [
        ("mxfp4", "mxfp4", 32),
        ("mxfp8_e4m3", "int4_row_asym", 32),
        ("int4_row_asym", "int4_row_asym", 2),
        ("int2_row_asym", "int4_row_asym", 4),
        ("amxfp4", "int4_g128", 128),
        ("int8_row", "int8_row", 1),
    ],
)
def test_a_head_is_whole_blocks_and_whole_bytes(keys: str, values: str, expected: int) -> None:
    found = scheme(keys, values).head_block
    assert found == expected
    formats = FORMATS[keys], FORMATS[values]
    assert all(found % (one.block or 1) == 0 and found * one.bits % 8 == 0 for one in formats)


def test_in_words() -> None:
    assert scheme().spelled == "keys mxfp4 even, values mxfp4 even"
    assert scheme(key_transform="hadamard", first=16, last=128).spelled == (
        "keys mxfp4 even under hadamard, values mxfp4 even; the first 16 and the last 128 tokens in 16 bit"
    )


def test_the_matrices_that_a_module_has() -> None:
    assert scheme(key_transform="hadamard").stored_names == ()
    assert scheme(key_transform="stored").stored_names == ("key_transform",)
    assert scheme(key_transform="stored", value_transform="stored").stored_names == ("key_transform", "value_transform")


@pytest.mark.parametrize(
    ("keys", "more", "expected"),
    [
        (("mxfp4", "mse"), {}, "cache: keys: rule 'mse' is for weights only"),
        (("mxfp4", "x3"), {}, "cache: keys: mxfp4 x3 has a scale for a whole tensor"),
        (("nvfp4", None), {}, "cache: keys: nvfp4 absmax has a scale for a whole tensor"),
        (("mxfp4", None), {"first": -1}, "cache: first: expected a number of tokens, 0 or more, got -1"),
        (("mxfp4", None), {"last": True}, "cache: last: expected a number of tokens, 0 or more, got True"),
        (
            ("mxfp4", None),
            {"key_transform": "second_moment"},
            "cache: key_transform: expected one of none, hadamard, s",
        ),
    ],
)
def test_what_is_refused(keys: tuple[str, str | None], more: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CacheScheme(TensorQuantizer.of(*keys), TensorQuantizer.of("mxfp4"), **more)
    assert str(caught.value).startswith(expected)


def test_nvfp4_of_rows_by_themselves_is_taken() -> None:
    found = TensorQuantizer.of("nvfp4")
    found = TensorQuantizer(found.format, found.rule.for_rows())
    assert CacheScheme(found, found).keys is found
