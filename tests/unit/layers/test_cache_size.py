"""What a cache takes, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.planning.shapes import LLAMA_3_8B
from transformers import Gemma2Config, MistralConfig

from mxrot.formats import CacheScheme, TensorQuantizer
from mxrot.layers.cache_size import CacheSize, bits_per_element
from mxrot.models import find_family
from mxrot.models.positions import block_windows


def scheme(name: str, **more: Any) -> CacheScheme:
    return CacheScheme(TensorQuantizer.of(name), TensorQuantizer.of(name), **more)


def size_of(config: Any, found: CacheScheme | None = None) -> CacheSize:
    return CacheSize.of(config, find_family(config, "some/model"), found)


@pytest.mark.parametrize(
    ("name", "width", "bits"),
    [
        ("mxfp4", 64, 4 + 8 / 32),
        ("mxfp8_e4m3", 128, 8 + 8 / 32),
        ("int4_row_asym", 64, 4 + (16 + 8) / 64),
        ("int4_row_asym", 128, 4 + (16 + 8) / 128),
        ("int2_g32_asym", 64, 2 + (16 + 8) / 32),
        ("int2_row_asym", 64, 2 + (16 + 8) / 64),
    ],
)
def test_bits_are_those_that_are_stored(name: str, width: int, bits: float) -> None:
    assert bits_per_element(scheme(name), width) == bits
    assert bits_per_element(None, width) == 16


def test_keys_and_values_may_differ() -> None:
    mixed = CacheScheme(TensorQuantizer.of("mxfp8_e4m3"), TensorQuantizer.of("mxfp4"))
    assert bits_per_element(mixed, 64) == (8.25 + 4.25) / 2


def test_llama_3_8b_takes_128_kib_a_token_in_16_bits() -> None:
    plain = size_of(LLAMA_3_8B)
    assert plain.bytes_at(1) == 2 * 32 * 8 * 128 * 2 == 131072
    assert plain.bytes_at(8192) == 1 << 30
    packed = size_of(LLAMA_3_8B, scheme("mxfp4"))
    assert packed.bytes_at(8192) * 16 == (1 << 30) * 4.25


def test_the_first_and_the_newest_tokens_stand_beside_in_16_bits() -> None:
    plain, codes = size_of(LLAMA_3_8B).bytes_at(1), size_of(LLAMA_3_8B, scheme("mxfp4"))
    with_both = size_of(LLAMA_3_8B, scheme("mxfp4", first=16, last=128))
    # The newest token of the next query is that query's own: 127 of those before it.
    assert with_both.bytes_at(1000) == codes.bytes_at(1000) + (16 + 127) * plain
    assert with_both.bytes_at(5) == codes.bytes_at(5) + (5 + 5) * plain


def test_a_window_bounds_its_blocks_alone() -> None:
    every = MistralConfig(architectures=["MistralForCausalLM"], sliding_window=100, num_hidden_layers=3)
    assert block_windows(every, find_family(every, "m")) == (100,) * 3
    assert size_of(every).bytes_at(500) == size_of(every).bytes_at(100)
    some = Gemma2Config(architectures=["Gemma2ForCausalLM"], sliding_window=100, num_hidden_layers=4)
    windows = block_windows(some, find_family(some, "g"))
    assert sorted(windows, key=str) == [100, 100, None, None]
    one = 2 * some.num_key_value_heads * some.head_dim * 2
    assert size_of(some).bytes_at(500) == one * (2 * 500 + 2 * 100)
    assert block_windows(LLAMA_3_8B, find_family(LLAMA_3_8B, "l")) == (None,) * 32


def test_the_table_has_both_lengths() -> None:
    table = size_of(LLAMA_3_8B, scheme("mxfp4", key_transform="hadamard")).as_table()
    assert table["bits_per_element"] == 4.25 and "under hadamard" in table["scheme"]
    assert list(table["bytes"]) == ["8192", str(LLAMA_3_8B.max_position_embeddings)] or list(table["bytes"]) == ["8192"]
    assert table["bytes"]["8192"] / table["bytes_in_16_bit"]["8192"] == 4.25 / 16
    assert size_of(LLAMA_3_8B).as_table()["scheme"] is None
