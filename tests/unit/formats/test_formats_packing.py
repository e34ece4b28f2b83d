"""Byte layouts, by hand."""

import pytest
import torch

from mxrot.formats import pack_codes, unpack_codes


def test_four_bits_put_the_even_column_into_the_low_nibble() -> None:
    codes = torch.tensor([[0x1, 0x2, 0xF, 0x0], [0x8, 0x7, 0x0, 0xA]], dtype=torch.uint8)
    packed = torch.tensor([[0x21, 0x0F], [0x78, 0xA0]], dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, 4), packed)
    assert torch.equal(unpack_codes(packed, 4), codes)


def test_six_bits_put_four_codes_into_three_bytes_from_the_lowest_bit_up() -> None:
    codes = torch.tensor([[0b000001, 0b000010, 0b000011, 0b000100]], dtype=torch.uint8)
    packed = torch.tensor([[0b10_000001, 0b0011_0000, 0b000100_00]], dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, 6), packed)
    assert torch.equal(unpack_codes(packed, 6), codes)


@pytest.mark.parametrize("position", range(4))
def test_six_bits_keep_the_codes_apart(position: int) -> None:
    codes = torch.zeros(4, dtype=torch.uint8)
    codes[position] = 63
    word = 63 << (6 * position)
    assert pack_codes(codes, 6).tolist() == [word & 255, word >> 8 & 255, word >> 16]


def test_eight_bits_are_as_they_are() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, 8), codes)
    assert torch.equal(unpack_codes(codes, 8), codes)


@pytest.mark.parametrize(("bits", "columns"), [(4, 3), (6, 6), (6, 7)])
def test_codes_that_leave_a_byte_half_full_are_refused(bits: int, columns: int) -> None:
    with pytest.raises(ValueError, match=f"{columns} codes of {bits} bits do not fill whole bytes"):
        pack_codes(torch.zeros(2, columns, dtype=torch.uint8), bits)
