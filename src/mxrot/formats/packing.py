"""Pack codes of 2, 4, 6 or 8 bits into bytes along the last dimension, and unpack them.

2 bits: four codes per byte, the first one in the lowest bits.
4 bits: two codes per byte, the even column in the low nibble (compressed-tensors, torch.float4_e2m1fn_x2).
6 bits: four codes in three bytes, little-endian, the first code in the lowest bits.
8 bits: one code per byte.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., K] into bytes [..., K * bits / 8]. ValueError if K codes do not fill whole bytes."""
    if bits == 8:
        return codes
    codes_per_word = {2: 4, 4: 2, 6: 4}[bits]
    if codes.shape[-1] % codes_per_word:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes")
    groups = codes.unflatten(-1, (-1, codes_per_word))
    if bits == 4:
        return groups[..., 0] | (groups[..., 1] << 4)
    if bits == 2:
        return groups[..., 0] | groups[..., 1] << 2 | groups[..., 2] << 4 | groups[..., 3] << 6
    wide = groups.to(torch.int32)
    word = wide[..., 0] | wide[..., 1] << 6 | wide[..., 2] << 12 | wide[..., 3] << 18
    return torch.stack([word & 255, word >> 8 & 255, word >> 16], dim=-1).to(torch.uint8).flatten(-2)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: bytes [..., K * bits / 8] to uint8 codes [..., K]."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    if bits == 2:
        return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    wide = packed.unflatten(-1, (-1, 3)).to(torch.int32)
    word = wide[..., 0] | wide[..., 1] << 8 | wide[..., 2] << 16
    return torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], dim=-1).to(torch.uint8).flatten(-2)
