"""Tokens as codes: what is read is what quantizing all at once gives, and room grows by steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.formats import TensorQuantizer
from mxrot.layers.packed_tokens import PackedTokens

FORMATS = ("mxfp4", "mxfp8_e4m3", "int4_row_asym", "int4_g32_asym", "int4_row", "mxint8")


def rows(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of two sequences and three heads of width 64."""
    return torch.randn(2, 3, tokens, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_is_what_quantizing_gives_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    quantizer, x = TensorQuantizer.of(name), rows(150, dtype=dtype)
    tokens = PackedTokens(quantizer)
    for piece in x.split([1, 70, 0, 78, 1], dim=2):
        tokens.append(piece)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert tokens.length == 150
    assert torch.equal(tokens.read(0, 150, work), quantizer(x))
    assert torch.equal(tokens.read(40, 90, work), quantizer(x[:, :, 40:90]))
    assert tokens.codes.shape == (2, 3, 150, 64 * quantizer.format.bits // 8)
    assert set(tokens.parts) == set(quantizer.part_names)


def test_tokens_leave_at_both_ends_and_others_come() -> None:
    quantizer, x = TensorQuantizer.of("mxfp4"), rows(300)
    tokens = PackedTokens(quantizer)
    tokens.append(x[:, :, :100])
    tokens.drop_last(10)
    tokens.drop_first(20)
    tokens.append(x[:, :, 90:])
    assert tokens.length == 280 and torch.equal(tokens.read(0, 280), quantizer(x[:, :, 20:]))


def test_sequences_are_chosen() -> None:
    quantizer, x = TensorQuantizer.of("int4_row_asym"), rows(9)
    tokens = PackedTokens(quantizer)
    tokens.append(x)
    tokens.select(torch.tensor([1, 1, 0]))
    tokens.append(rows(1, seed=1)[[0, 1, 0]])
    expected = torch.cat([x[[1, 1, 0]], rows(1, seed=1)[[0, 1, 0]]], dim=2)
    assert torch.equal(tokens.read(0, 10), quantizer(expected))


def test_room_grows_by_steps_and_little_of_it_is_idle() -> None:
    tokens, copies, capacity = PackedTokens(TensorQuantizer.of("mxfp4")), 0, 0
    one = rows(1)[:1, :1]
    for length in range(1, 3001):
        tokens.append(one)
        if tokens.capacity != capacity:
            copies, capacity = copies + length, tokens.capacity
        assert tokens.length == length and capacity - length <= length / 64 + 64
    assert copies <= 32 * 3000
    assert tokens.nbytes == capacity * (32 + 2)


def test_a_window_that_slides_takes_no_more_room() -> None:
    tokens, x = PackedTokens(TensorQuantizer.of("mxfp4")), rows(1000)
    for index in range(1000):
        tokens.append(x[:, :, index : index + 1])
        tokens.drop_first(max(0, tokens.length - 100))
        assert tokens.capacity <= 101 + 101 // 64 + 64
    assert torch.equal(tokens.read(0, 100), tokens.quantizer(x[:, :, 900:]))


def test_room_that_is_not_needed_is_given_back() -> None:
    tokens, x = PackedTokens(TensorQuantizer.of("mxfp4")), rows(1000)
    tokens.append(x)
    tokens.shrink()
    assert tokens.capacity >= 1000
    tokens.drop_first(900)
    tokens.shrink()
    assert tokens.capacity == 128 and torch.equal(tokens.read(0, 100), tokens.quantizer(x[:, :, 900:]))


def test_what_is_made_in_inference_mode_is_written_outside_of_it() -> None:
    tokens = PackedTokens(TensorQuantizer.of("mxfp4"))
    with torch.inference_mode():
        tokens.append(rows(3))
    with torch.no_grad():
        tokens.append(rows(3))
    assert torch.equal(tokens.read(0, 3), tokens.read(3, 6))


def test_what_is_not_finite_is_read_as_nan_and_harms_no_other() -> None:
    tokens, x = PackedTokens(TensorQuantizer.of("mxfp4")), rows(3)
    x[0, 0, 1, 5] = torch.nan
    tokens.append(x)
    found = tokens.read(0, 3)
    assert found[0, 0, 1, :32].isnan().all() and found.isnan().sum() == 32


def test_a_scale_of_the_whole_tensor_is_refused() -> None:
    with pytest.raises(ConfigError, match="nvfp4 absmax has a scale for a whole tensor"):
        PackedTokens(TensorQuantizer.of("nvfp4"))
