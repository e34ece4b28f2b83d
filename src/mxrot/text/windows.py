"""Windows of tokens for calibration and evaluation, and the tokens that are in none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxrot.errors import ConfigError, DataError
from mxrot.progress import Progress, silent
from mxrot.text.document import Own, Text, TokenWindows
from mxrot.text.tokens import Reader, check_ids, token_ids


@dataclass(frozen=True)
class Windows:
    """The windows of one text."""

    text: Text
    ids: Tensor
    """int64 [W, T]. Empty if the model is yet to write them."""
    tokens: int
    """The tokens of the text, without the start tokens of windows."""
    whole: int
    """The number of windows that the text fills. `ids` are some or all of them."""
    left_out: int
    """The number of tokens after the last window, which fill none."""
    ends: bool
    """True if the last of these is the end-of-text token."""
    asked: int | None = None
    """The requested number of windows. None for all."""

    @property
    def to_write(self) -> int:
        """The number of windows that the model is to write."""
        return self.whole if isinstance(self.text.content, Own) else 0

    def as_table(self) -> dict[str, Any]:
        """The entry for a record."""
        return {
            "name": self.text.name,
            "sha256": self.text.digest,
            "read_as": self.text.rendered,
            **self.text.origin.as_table(),
            "tokens": self.tokens,
            "windows_asked": self.asked,
            "windows_filled": self.whole,
            "windows": len(self.ids) + self.to_write,
            "seq_len": self.ids.shape[1],
            "tokens_left_out": self.left_out,
            "end_token_left_out": self.ends,
        }


def read_windows(
    text: Text,
    reader: Reader,
    seq_len: int,
    limit: int | None = None,
    spread: bool = False,
    progress: Progress = silent,
) -> Windows:
    """Windows of `seq_len` tokens without overlap. The tail that fills no window is left out, and counted.

    With a `limit` the first ones are kept, or with `spread` evenly spaced ones. If the reader has a start, it comes
    before the text of each window. Given windows keep their own length.

    A text that the model is to write has no windows yet, and `whole` is the number to write.

    DataError if the text does not fill one window. ConfigError if a kept token is beyond the embedding.
    """
    if seq_len < 2:
        raise ConfigError(f"seq_len must be at least 2, got {seq_len}")
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of windows must be positive, got {limit}")
    if isinstance(text.content, Own):
        count = 1 if limit is None else limit
        return Windows(text, torch.empty(0, seq_len, dtype=torch.int64), 0, count, 0, False, count)
    if isinstance(text.content, TokenWindows):
        windows, tail = _checked(text.content.ids, text.name, reader), torch.empty(0, dtype=torch.int64)
        tokens = windows.numel()
    else:
        ids = token_ids(text, reader, progress)
        windows, tail = _cut(ids, text.name, seq_len, reader.start)
        tokens = len(ids)
    whole = len(windows)
    if limit is not None and limit < whole:
        windows = windows[torch.arange(limit) * whole // limit if spread else torch.arange(limit)]
    check_ids(windows, text.name, reader)
    end = getattr(reader.tokenizer, "eos_token_id", None)
    ends = len(tail) > 0 and end is not None and int(tail[-1]) == end
    return Windows(text, windows, tokens, whole, len(tail), ends, limit)


def token_windows(
    text: Text, tokenizer: Any, seq_len: int, limit: int | None, spread: bool = False, start: int | None = None
) -> Tensor:
    """Only the windows, int64 [W, seq_len], for a tokenizer whose model is not known."""
    return read_windows(text, Reader(tokenizer, start), seq_len, limit, spread).ids


def _cut(ids: Tensor, name: str, seq_len: int, start: int | None) -> tuple[Tensor, Tensor]:
    """The windows, and the remaining tokens."""
    length = seq_len - (start is not None)
    count = len(ids) // length
    if count == 0:
        raise DataError(
            f"{name}: {len(ids)} tokens do not fill one window of {seq_len}; give a longer text or a smaller --seq-len"
        )
    windows = ids[: count * length].view(count, length)
    if start is not None:
        windows = F.pad(windows, (1, 0), value=start)
    return windows, ids[count * length :]


def _checked(windows: Tensor, name: str, reader: Reader) -> Tensor:
    """Given windows, unchanged. ConfigError if this model cannot read them."""
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ConfigError(f"{name}: windows of shape {tuple(windows.shape)}; expected at least one, of two tokens")
    if reader.start is not None:
        other = windows[windows[:, 0] != reader.start]
        if len(other):
            raise ConfigError(
                f"{name}: a window begins with token {int(other[0, 0])}; texts for this model begin with {reader.start}"
            )
    return windows
