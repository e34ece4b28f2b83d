"""Several texts to calibrate on: the number of windows of each."""

from __future__ import annotations

from collections.abc import Sequence

from mxrot.errors import ConfigError
from mxrot.progress import Progress, silent
from mxrot.text.document import Text, TokenWindows
from mxrot.text.tokens import Reader
from mxrot.text.windows import Windows, read_windows


def mixed_windows(
    texts: Sequence[Text], reader: Reader, seq_len: int, count: int, progress: Progress = silent
) -> list[Windows]:
    """`count` windows in all, evenly spaced over each text. Each text gives its share by weight.

    A text with fewer windows gives all it has, and they are not replaced. ConfigError if a share is less than one
    window, or if given windows have another length than the rest.
    """
    if count < 1:
        raise ConfigError(f"the number of windows must be positive, got {count}")
    given = {text.name: text.content.ids.shape[1] for text in texts if isinstance(text.content, TokenWindows)}
    for name, length in given.items():
        if length != seq_len:
            raise ConfigError(f"{name}: windows of {length} tokens, and seq_len is {seq_len}; give one length")
    shares = split_by_weight(count, [text.weight for text in texts])
    for text, share in zip(texts, shares, strict=True):
        if share < 1:
            raise ConfigError(
                f"{text.name}: its share is none of {count} windows over {len(texts)} texts; take more (--samples) or "
                "give it more weight"
            )
    return [
        read_windows(text, reader, seq_len, share, True, progress) for text, share in zip(texts, shares, strict=True)
    ]


def split_by_weight(count: int, weights: Sequence[float]) -> list[int]:
    """`count` in whole parts, as close to the weights as possible. The rest goes to the largest remainders, and to the
    first of equal ones."""
    total = sum(weights)
    exact = [count * weight / total for weight in weights]
    parts = [int(part) for part in exact]
    largest = sorted(range(len(parts)), key=lambda index: parts[index] - exact[index])
    for index in largest[: count - sum(parts)]:
        parts[index] += 1
    return parts
