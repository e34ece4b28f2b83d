"""Keys or values of the tokens so far as codes: one token of a head is one row in the format of a `TensorQuantizer`.

Tokens are appended at the end. They can be removed from both ends: a rejected draft from the end, tokens that have left
a sliding window from the start. Buffers grow in steps proportional to the length, so each token costs a bounded number
of copies. At most 64 tokens plus one 64th of the length are unused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.formats import Parts, QTensor, TensorQuantizer, as_blocks, choose_parts, encode_blocks, pack_codes

STEP = 64
"""The minimum number of tokens that room is made for."""
SHARE = 64
"""Room is also made for at least one token per this many that are kept."""


class PackedTokens:
    """Rows [B, heads, tokens, D], each quantized by itself, in float32 (float64 for float64 rows).

    The buffers keep tokens `start` to `start + length`, which `codes` and `parts` show. ConfigError for a quantizer
    with a part for a whole tensor, and for rows that are not whole blocks.
    """

    def __init__(self, quantizer: TensorQuantizer) -> None:
        if any(part.per == "tensor" for part in quantizer.format.grid.parts(quantizer.rule)):
            raise ConfigError(
                f"cache: {quantizer.spelled} has a scale for a whole tensor, and tokens are kept one by one; take "
                "another rule"
            )
        self.quantizer = quantizer
        self.buffers: dict[str, Tensor] = {}
        """"codes", uint8 [B, heads, capacity, D * bits / 8], and the parts of the format by their names, [B, heads,
        capacity, G, ...] with an entry a block, or [B, heads, capacity, 1, ...] a row."""
        self.start = 0
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.buffers["codes"].shape[2] if self.buffers else 0

    @property
    def end(self) -> int:
        """The index in the buffers of the next token."""
        return self.start + self.length

    @property
    def codes(self) -> Tensor:
        """Packed codes, uint8 [B, heads, length, D * bits / 8]: a view."""
        return self._kept("codes", 0, self.length)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The parts of the format by name, [B, heads, length, G, ...]: views."""
        return {name: self._kept(name, 0, self.length) for name in self.buffers if name != "codes"}

    @property
    def nbytes(self) -> int:
        """The bytes of the buffers, with unused room."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @torch.no_grad()
    def append(self, rows: Tensor) -> None:
        """Quantize and store floating-point rows [B, heads, n, D]. A row that holds NaN or Inf is read as NaN."""
        format, tokens = self.quantizer.format, rows.shape[2]
        blocks = as_blocks(rows, format, "cache")
        quantized = encode_blocks(blocks, choose_parts(blocks, format, self.quantizer.rule), format)
        found = {"codes": pack_codes(quantized.codes, format.bits), **quantized.parts.tensors}
        self.reserve(tokens, found)
        for name, new in found.items():
            self.buffers[name][:, :, self.end : self.end + tokens] = new
        self.length += tokens

    def reserve(self, tokens: int, like: dict[str, Tensor] | None = None) -> None:
        """Make room for `tokens` more tokens. `like` has tensors of the shapes and types of the first buffers."""
        if self.end + tokens <= self.capacity and self.buffers:
            return
        before = self.buffers or like
        assert before is not None
        self._move_to(before, self.length + tokens)

    def shrink(self) -> None:
        """Shrink the buffers if more than half of them is unused."""
        if self.capacity > 2 * _room_for(self.length):
            self._move_to(self.buffers, self.length)

    def _move_to(self, like: dict[str, Tensor], tokens: int) -> None:
        """New buffers for `tokens` tokens, with the tokens that are kept."""
        with torch.inference_mode(False):  # makes buffers that can be written in any mode
            made = {n: x.new_empty(*x.shape[:2], _room_for(tokens), *x.shape[3:]) for n, x in like.items()}
        for name in self.buffers:
            made[name][:, :, : self.length] = self._kept(name, 0, self.length)
        self.buffers, self.start = made, 0

    def read(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of tokens `start` to `stop` of those that are kept, in float32 or float64 [B, heads, n, D]."""
        codes, format = self._kept("codes", start, stop), self.quantizer.format
        parts = self._read_parts(start, stop)
        if dtype == torch.float32:
            return QTensor.dequantize_packed(codes, parts, format)
        return QTensor.from_packed(codes, parts, format).dequantize(dtype)

    def _read_parts(self, start: int, stop: int) -> Parts:
        return self.quantizer.as_parts([self._kept(name, start, stop) for name in self.quantizer.part_names])

    def drop_last(self, tokens: int) -> None:
        """Forget `tokens` tokens at the end."""
        self.length -= tokens

    def drop_first(self, tokens: int) -> None:
        """Forget `tokens` tokens at the start."""
        self.start += tokens
        self.length -= tokens

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences of the batch, int64 [B'], in this order. A sequence may occur several times."""
        self.buffers = {
            name: buffer.index_select(0, sequences.to(buffer.device)) for name, buffer in self.buffers.items()
        }

    def move(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        self.buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}

    def _kept(self, name: str, start: int, stop: int) -> Tensor:
        return self.buffers[name][:, :, self.start + start : self.start + stop]


def _room_for(tokens: int) -> int:
    return -(-(tokens + tokens // SHARE) // STEP) * STEP
